"""Muon: orthogonal updates for the layers' matrices, AdamW for all else, the same for any W."""

from pathlib import Path

import pytest
import torch
from saved import CONFIG

from raygpt import muon
from raygpt.config import ModelConfig, OptimConfig
from raygpt.model import GPT
from raygpt.muon import MuonAdamW, orthogonal
from raygpt.optim import build_optimizer, set_lr
from raygpt.storage import Folder
from raygpt.train.checkpoints import Position, latest
from raygpt.train.state import restore, save

pytestmark = pytest.mark.usefixtures("library")

MUON = OptimConfig(matrices="muon", max_lr=1e-3, muon_lr=0.02, weight_decay=0.1)
LAYER = [
    f"transformer.h.{layer}.{name}.weight"
    for layer in range(CONFIG.model.n_layer)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def build(config: OptimConfig = MUON) -> tuple[GPT, torch.optim.AdamW]:
    torch.manual_seed(1)
    model = GPT(CONFIG.model)
    return model, build_optimizer(model, config)


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: int, seed: int = 3) -> float:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for _ in range(steps):
        tokens = torch.randint(0, 16, (4, 9), generator=generator)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        set_lr(optimizer, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 16, 48), (2, 24, 96)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    matrices = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = torch.linspace(0.1, 1, s.shape[-1]).expand_as(s)  # a condition that the iterations cure
    values = torch.linalg.svdvals(orthogonal(u * s[..., None, :] @ v))
    assert values.min() > 0.6 and values.max() < 1.3
    size = matrices.norm()
    assert torch.allclose(orthogonal(matrices / size), orthogonal(matrices), atol=1e-3), "any scale"


def test_only_matrices_of_layers_have_it() -> None:
    model, optimizer = build()
    names = {id(p): name for name, p in model.named_parameters()}
    with_muon = [
        names[id(p)]
        for group in optimizer.param_groups
        if group.get("muon_parts")
        for p in group["params"]
    ]
    assert sorted(with_muon) == sorted(LAYER)
    everything = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(names.values())
    assert type(build(OptimConfig())[1]) is torch.optim.AdamW


def test_a_step_is_as_its_authors_write_it() -> None:
    model, optimizer = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.arange(36).view(4, 9) % 16
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    set_lr(optimizer, 5e-4)  # half of what max_lr is, so half of muon_lr
    optimizer.step()
    after = dict(model.named_parameters())
    for name in LAYER:
        parts = 3 if "c_attn" in name else 1
        gradient = 0.0975 * gradients[name]  # the first momentum is 0.05 g, looked ahead this
        rows, columns = gradient.shape[0] // parts, gradient.shape[1]
        matrices = gradient.view(parts, rows, columns)
        tall = rows > columns
        update = orthogonal(matrices.mT).mT if tall else orthogonal(matrices)
        update = update.reshape_as(gradient)
        scale = max(1.0, rows / columns) ** 0.5
        expected = before[name] * (1 - 0.01 * 0.1) - 0.01 * scale * update
        torch.testing.assert_close(after[name].detach(), expected, atol=2e-5, rtol=0)
    plain, adamw = build(OptimConfig(max_lr=1e-3, weight_decay=0.1))
    plain(tokens[:, :-1], tokens[:, 1:]).backward()
    set_lr(adamw, 5e-4)
    adamw.step()
    for name, p in plain.named_parameters():
        if name not in LAYER:
            assert torch.equal(p, after[name]), name


def test_stacks_that_are_too_large_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for most in (muon._STACK_ELEMENTS, 1):  # all of a shape at once, and one by one
        monkeypatch.setattr(muon, "_STACK_ELEMENTS", most)
        model, optimizer = build()
        train(model, optimizer, 1)
        models.append(dict(model.named_parameters()))
    untrained = dict(build()[0].named_parameters())
    for name in LAYER:
        torch.testing.assert_close(models[0][name], models[1][name], atol=2e-5, rtol=0)
        assert not torch.allclose(models[1][name], untrained[name], atol=2e-5, rtol=0), name


def test_its_state_is_saved_and_restored_to_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 3)
    run = Folder.from_path(str(tmp_path))
    save(run, Position(step=3), model, optimizer, {})
    train(model, optimizer, 2, seed=4)
    other, its = build()
    checkpoint = latest(run)
    assert checkpoint is not None
    restore(checkpoint, other, its)
    assert isinstance(its, MuonAdamW)
    train(other, its, 2, seed=4)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_it_learns() -> None:
    model, optimizer = build()
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 60) < first - 1


def test_a_modern_model_has_no_parameter_without_an_optimizer() -> None:
    config = ModelConfig(2, 2, 16, 8, 264, positions="rotary", norm="rms", bias=False)
    model = GPT(config)
    groups = build_optimizer(model, MUON).param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == model.num_params()
