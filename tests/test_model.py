"""The network: its shapes and numbers, and what padding the vocabulary may not change."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from raygpt.config import ModelConfig
from raygpt.model import GPT, Block, Rotary
from raygpt.sizes import flops_per_token, num_params

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)


def _batch(n_vocab: int = 32, B: int = 3, T: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, n_vocab, (B, T + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def _model(config: ModelConfig = TINY, n_vocab: int | None = None) -> GPT:
    torch.manual_seed(1)
    return GPT(config, n_vocab)


def test_gpt2_124m_has_the_published_size() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(), 50_257)
    assert round(model.num_params() / 1e6, 2) == 124.48
    assert model.num_params() == num_params(model.config)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_untrained_loss_is_that_of_a_uniform_guess() -> None:
    # The vocabulary and width of GPT-2 124M, with fewer layers for speed.
    model = _model(ModelConfig(n_layer=2, block_size=32))
    idx, targets = _batch(50_304, B=4, T=32)
    with torch.no_grad():
        assert model(idx, targets).item() == pytest.approx(math.log(50_304), abs=0.25)


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model = _model()
    idx, targets = _batch()
    logits, loss = model(idx), model(idx, targets)
    assert logits.shape == (3, 8, 32)
    assert loss.dtype == torch.float32 and loss.shape == ()
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


MODERN = replace(TINY, positions="rotary", norm="rms", qk_norm=True, activation="relu2", bias=False)
VARIANTS = [
    replace(TINY, positions="rotary"), replace(TINY, norm="rms"), replace(TINY, qk_norm=True),
    replace(TINY, activation="relu2"), replace(TINY, bias=False), MODERN,
]  # fmt: skip


@pytest.mark.parametrize("config", VARIANTS)
def test_each_variant_has_its_size_and_learns(config: ModelConfig) -> None:
    model = _model(config)
    assert model.num_params() == num_params(config)
    assert not any(name.endswith(".bias") for name in model.state_dict()) or config.bias
    if config.bias:  # which begin at zero
        assert not torch.equal(model(*_batch()), _model()(*_batch()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(*_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_rotary_positions_are_relative() -> None:
    """The product of two turned vectors depends on their distance alone, and their lengths stay."""
    turn = Rotary(replace(TINY, positions="rotary", block_size=32))
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1))
    queries, keys = (turn(x.expand(1, 1, 32, 8))[0, 0] for x in (q, k))
    turned = queries @ keys.T
    for distance in range(-5, 6):
        diagonal = turned.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert not torch.allclose(turned.diagonal(0)[:1], turned.diagonal(5)[:1], atol=1e-3)
    assert torch.allclose(queries.norm(dim=-1), q.norm().expand(32), atol=1e-5)


def test_squared_relu_and_rms_norm_are_those_of_their_papers() -> None:
    model = _model(MODERN).double()
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = model.transformer.h[0]
    assert isinstance(block, Block)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(block.ln_1(x), normed)
    mlp = block.mlp
    hidden = (x @ mlp.c_fc.weight.T).clamp(min=0) ** 2
    assert torch.allclose(mlp(x), hidden @ mlp.c_proj.weight.T)


def test_queries_and_keys_have_the_length_of_their_heads() -> None:
    """So that their size cannot matter: scaling what makes them changes nothing."""
    model, idx = _model(replace(TINY, qk_norm=True)), _batch()[0]
    before = model(idx)
    with torch.no_grad():
        for block in model.transformer.h:
            assert isinstance(block, Block)
            block.attn.c_attn.weight[: 2 * 16] *= 3
            block.attn.c_attn.bias[: 2 * 16] *= 3
    assert torch.allclose(model(idx), before, atol=1e-4)


@pytest.mark.parametrize("config", [TINY, MODERN])
def test_a_token_sees_only_those_before_it(config: ModelConfig) -> None:
    model = _model(config).eval()
    idx, _ = _batch()
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 32
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_positions_matter() -> None:
    logits = _model().eval()(torch.full((1, 8), 3))
    assert not torch.allclose(logits[0, 0], logits[0, 7])


def test_initial_weights_follow_gpt2() -> None:
    model = _model(ModelConfig(n_layer=8, n_head=2, n_embd=128, block_size=64, vocab_size=512))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * std, name


def test_initial_weights_are_a_function_of_the_seed() -> None:
    def drawn(model: GPT, seed: int) -> Tensor:
        model.init_weights(torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in model.parameters()])

    first, again = _model(), _model()
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(drawn(first, 7), drawn(again, 7))
    assert not torch.equal(drawn(first, 7), drawn(first, 8))


def test_too_long_input_and_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"9 tokens are more than model.block_size 8"):
        _model()(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="n_vocab 33"):
        GPT(TINY, 33)


def test_padding_changes_neither_loss_nor_gradient() -> None:
    padded = _model(n_vocab=27)
    plain = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=27))
    state = padded.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][:27]
    plain.load_state_dict(state)

    idx, targets = _batch(27)
    losses = [model(idx, targets) for model in (padded, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for (name, a), b in zip(padded.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert a.grad.isfinite().all(), name
        torch.testing.assert_close(a.grad[: len(b)], b.grad, atol=1e-7, rtol=1e-4)
        assert (a.grad[len(b) :] == 0).all(), name

    logits = padded(idx)
    assert (logits[..., 27:] == -math.inf).all()
    assert logits[..., :27].isfinite().all()


def test_padding_is_not_part_of_the_state() -> None:
    assert set(_model(n_vocab=27).state_dict()) == set(_model().state_dict())


def test_bf16_autocast_computes_the_loss_in_fp32() -> None:
    model = _model(n_vocab=27)
    idx, targets = _batch(27)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
        logits = model(idx)
    loss.backward()
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_bf16_model_has_an_fp32_loss() -> None:
    loss = _model(n_vocab=27).bfloat16()(*_batch(27))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("config", [TINY, MODERN])
def test_layers_compile_in_one_graph_and_share_it(config: ModelConfig) -> None:
    model, plain = _model(config, n_vocab=27), _model(config, n_vocab=27)
    counter = CompileCounter()
    model.compile_layers(backend=counter, fullgraph=True)
    assert torch.equal(model(*_batch(27)), plain(*_batch(27)))
    assert counter.frame_count == 1 and len(model.transformer.h) == 2
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_layers_are_compiled_for_each_shape_whatever_came_before() -> None:
    """Else a restart would compute with other layers than the run that was never interrupted."""
    torch.compiler.reset()
    model, counter = _model(TINY, n_vocab=27), CompileCounter()
    model.compile_layers(backend=counter, fullgraph=True)
    idx, targets = _batch(27)
    for times in range(1, 11):  # more shapes than torch would compile for
        model(idx.repeat(times, 1), targets.repeat(times, 1))
        assert counter.frame_count == times


def test_activations_that_are_computed_again_are_the_same_bits() -> None:
    config = ModelConfig(n_layer=4, n_head=2, n_embd=32, block_size=16, vocab_size=32, dropout=0.5)
    idx = torch.arange(64).view(4, 16) % 32
    gradients, kept = [], []
    for again in (False, True):
        model = _model(config)
        if again:
            model.checkpoint_activations()
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(idx, idx)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(sizes))
    assert all(map(torch.equal, *gradients))
    assert kept[1] < kept[0] / 3


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32, dropout=0.5)
    model = _model(config)
    idx, _ = _batch()
    torch.manual_seed(3)
    first, other = model(idx), model(idx)
    torch.manual_seed(3)
    assert torch.equal(first, model(idx))
    assert not torch.equal(first, other)
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_flops_follow_palm() -> None:
    # GPT-2 124M: 6 x (124,475,904 - 1,024 x 768) + 12 x 12 layers x 12 heads x 64 x 1,024 tokens
    assert flops_per_token(ModelConfig()) == 742_136_832 + 113_246_208
