"""AdamW's groups and the learning rate."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raygpt.config import ModelConfig, OptimConfig
from raygpt.model import GPT
from raygpt.optim import build_optimizer, lr_at, param_groups, set_lr

RATES: dict[str, Any] = {"max_lr": 6e-4, "min_lr": 6e-5}


def _gpt() -> GPT:
    return GPT(ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=16))


def test_matrices_and_embeddings_decay_and_nothing_else() -> None:
    model = _gpt()
    decay, rest = param_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert sorted(names[id(p)] for p in decay["params"]) == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.wpe.weight",
        "transformer.wte.weight",
    ]
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert all("ln_" in names[id(p)] or "bias" in names[id(p)] for p in rest["params"])


def test_parameters_that_do_not_train_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in param_groups(model, 0.1)] == [1, 0]


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_step_is_adamws(fused: bool) -> None:
    """Without history the update is lr * g / (|g| + eps), after decay by lr * weight_decay."""
    model = nn.Linear(3, 1)
    config = OptimConfig(weight_decay=0.5, betas=(0.9, 0.95), eps=1e-2)
    optimizer = build_optimizer(model, config, fused)
    assert optimizer.defaults["fused"] is (True if fused else None)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    gradient = torch.tensor([[1.0, -0.02, 0.0]])
    model.weight.grad, model.bias.grad = gradient.clone(), torch.tensor([2.0])
    set_lr(optimizer, 0.01)
    optimizer.step()
    expected = weight * (1 - 0.01 * 0.5) - 0.01 * gradient / (gradient.abs() + 1e-2)
    torch.testing.assert_close(model.weight.detach(), expected)
    torch.testing.assert_close(model.bias.detach(), bias - 0.01 * 2.0 / 2.01)


@pytest.mark.parametrize(
    ("tokens_before", "lr"),
    [
        (0, 6e-5),  # the first of ten warm-up steps
        (400, 3e-4),
        (900, 6e-4),
        (1000, 6e-4),  # the cosine begins at its top: no jump
        (3000, 6e-5 + 0.5 * (1 + math.cos(math.pi / 4)) * 5.4e-4),
        (5000, 3.3e-4),  # half-way
        (9000, 6e-5),
        (10**12, 6e-5),
    ],
)
def test_rate_at_known_points(tokens_before: int, lr: float) -> None:
    found = lr_at(tokens_before, 100, **RATES, warmup_tokens=1000, decay_tokens=9000)
    assert found == pytest.approx(lr, rel=1e-12)


def test_no_warmup_and_no_room_to_decay() -> None:
    assert lr_at(0, 100, **RATES, warmup_tokens=0, decay_tokens=1000) == 6e-4
    for decay_tokens in (500, 1000):
        rates = [
            lr_at(t, 100, **RATES, warmup_tokens=1000, decay_tokens=decay_tokens)
            for t in (0, 900, 1000, 1100)
        ]
        assert rates == pytest.approx([6e-5, 6e-4, 6e-5, 6e-5])


schedules = st.tuples(
    st.integers(1, 2**20), st.integers(1, 300), st.integers(1, 3000), st.floats(0.0, 1.0)
)


@given(schedules)
def test_constant_batches_give_the_schedule_by_steps(schedule: tuple[int, int, int, float]) -> None:
    batch, warmup, decay, ratio = schedule
    min_lr = ratio * 1e-3
    for step in range(0, warmup + decay + 3, 1 + (warmup + decay) // 50):
        if step < warmup:
            expected = 1e-3 * (step + 1) / warmup
        else:
            progress = min(1.0, (step - warmup) / decay)
            expected = min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (1e-3 - min_lr)
        found = lr_at(
            step * batch,
            batch,
            max_lr=1e-3,
            min_lr=min_lr,
            warmup_tokens=warmup * batch,
            decay_tokens=(warmup + decay) * batch,
        )
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-18)


@given(
    batches=st.lists(st.integers(1, 500), min_size=2, max_size=200),
    warmup=st.integers(0, 5000),
    decay=st.integers(0, 20_000),
)
def test_any_batches_rise_then_fall_between_the_limits(
    batches: list[int], warmup: int, decay: int
) -> None:
    """Under a ramp, too, there is one top, and the rate is never outside its limits."""
    seen, rates = 0, []
    for tokens in batches:
        rates.append((seen, lr_at(seen, tokens, **RATES, warmup_tokens=warmup, decay_tokens=decay)))
        seen += tokens
    rising = [lr for before, lr in rates if before < warmup]
    falling = [lr for before, lr in rates if before >= warmup]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < lr <= 6e-4 for lr in rising)
    assert all(6e-5 <= lr <= 6e-4 for lr in falling)
    if rising and falling and decay > warmup:
        assert rising[-1] == pytest.approx(6e-4)  # the step that ends the warm-up is at the top
