"""A wide layer keeps less for its backward pass, which finds the same bits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raygpt import recompute
from raygpt.config import ModelConfig
from raygpt.gelu import gelu_again
from raygpt.model import GPT

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=320)
MODERN = replace(
    CONFIG,
    positions="rotary",
    norm="rms",
    qk_norm=True,
    activation="relu2",
    bias=False,
)
WINDOWS = 3

pytestmark = pytest.mark.usefixtures("library")


def pass_through(config: ModelConfig, width: int, monkeypatch: pytest.MonkeyPatch) -> GPT:
    """A model after a pass forward and backward; recomputing from ``width`` channels on."""
    monkeypatch.setattr(recompute, "WIDE", width)
    torch.manual_seed(1)
    model = GPT(config)
    loss(model).backward()
    return model


def loss(model: GPT) -> Tensor:
    windows = torch.arange(WINDOWS * (CONFIG.block_size + 1)).view(WINDOWS, -1) * 7 % 320
    loss: Tensor = model(windows[:, :-1], windows[:, 1:])
    return loss


@pytest.mark.parametrize(
    "config", [CONFIG, MODERN, replace(CONFIG, dropout=0.3), replace(CONFIG, bias=False)]
)
def test_gradients_have_the_same_bits(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [pass_through(config, width, monkeypatch) for width in (64, 65)]
    for (name, ours), theirs in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert ours.grad is not None and theirs.grad is not None, name
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("config", [CONFIG, MODERN])
def test_six_of_sixteen_matrices_of_a_layer_are_not_kept(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = WINDOWS * CONFIG.block_size * CONFIG.n_embd * 4
    narrow, wide = (kept_bytes(config, width, monkeypatch) for width in (65, 64))
    assert narrow - wide == CONFIG.n_layer * 6 * matrix


def test_checkpointed_layers_keep_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = (kept_bytes(CONFIG, width, monkeypatch, checkpointed=True) for width in (65, 64))
    assert narrow == wide


def kept_bytes(
    config: ModelConfig, width: int, monkeypatch: pytest.MonkeyPatch, checkpointed: bool = False
) -> int:
    """What a forward pass allocated and did not free, in its second run."""
    model = pass_through(config, width, monkeypatch)
    if checkpointed:
        model.checkpoint_activations()
    loss(model).backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = loss(model)
    total = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    kept.backward()
    return total


def test_a_second_backward_pass_is_refused() -> None:
    x = torch.randn(6, 6, requires_grad=True)
    y = gelu_again(x * 1)[0].sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        y.backward()


def test_gelus_gradient_does_not_need_its_value_again() -> None:
    """As where the layer behind it is frozen."""
    x = torch.randn(6, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(gelu_again(x * 1)[0].sum(), x)
    y, again = gelu_again(x * 1)
    assert torch.equal(again(), y)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)
