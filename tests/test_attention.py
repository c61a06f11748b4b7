"""Causal attention by oneDNN's products: the numbers of fp64, whatever is kept or made again."""

import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from raygpt import attention, products
from raygpt.attention import causal_attention
from raygpt.config import ModelConfig
from raygpt.model import GPT


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where oneDNN is faster, in blocks of 16 queries, however small heads are."""
    monkeypatch.setattr(products, "is_faster", lambda: True)
    monkeypatch.setattr(attention, "SMALLEST", 1)
    monkeypatch.setattr(attention, "ROWS", 16)
    assert torch.get_num_threads() == 1


def values(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(tokens: int, size: int) -> Tensor:
    """Queries, keys and values in one matrix, as a layer makes them; (2, T, 3 * 3 * D)."""
    return values(2, tokens, 9 * size)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def with_gradient(
    together: Tensor, function: Callable[..., Tensor] = causal_attention
) -> tuple[Tensor, Tensor]:
    """What comes out, (2, T, 3 * D), and the gradient of what goes in."""
    leaf = together.clone().requires_grad_()
    B, T, C = leaf.shape
    parts = (part.view(B, T, 3, -1).transpose(1, 2) for part in leaf.split(C // 3, 2))
    y = function(*parts).transpose(1, 2).reshape(B, T, -1)
    (y * values(*y.shape, seed=2).to(y.dtype)).sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("kept", [0, 100], ids=["made again", "kept"])
@pytest.mark.parametrize(("tokens", "size"), [(16, 8), (7, 8), (48, 4), (41, 24)])
def test_values_and_gradients(
    tokens: int, size: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, less than one, several, and a rest."""
    monkeypatch.setattr(attention, "KEPT", kept)
    together = heads(tokens, size)
    exact = with_gradient(together.double(), by_torch)
    for ours, theirs in zip(with_gradient(together), exact, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


def test_what_is_made_again_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    together = heads(41, 8)
    found: list[Tensor] = []
    for kept in (0, 100):
        monkeypatch.setattr(attention, "KEPT", kept)
        found += with_gradient(together)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_sequences_know_nothing_of_each_other() -> None:
    """Workers have others beside each other."""
    together = heads(41, 8)
    y = with_gradient(together)[0]
    for i in range(2):
        assert torch.equal(with_gradient(together[i : i + 1])[0][0], y[i])
    leaf = together.clone()
    leaf[:, 30:] += 1
    assert torch.equal(with_gradient(leaf)[0][:, :30], y[:, :30]), "looks ahead"


def test_without_gradients_bits_are_the_same() -> None:
    q, k, v = (values(2, 3, 41, 8, seed=i) for i in range(3))
    with torch.no_grad():
        quiet = causal_attention(q, k, v)
    assert torch.equal(quiet, causal_attention(q.requires_grad_(), k, v))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_keeps_no_probabilities(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []

    def recorded(*arguments: Tensor) -> Tensor:
        p = probabilities(*arguments)
        made.append(weakref.ref(p))
        return p

    probabilities = attention._probabilities
    monkeypatch.setattr(attention, "_probabilities", recorded)
    q, k, v = (values(2, 3, 41, 24, seed=i).requires_grad_() for i in range(3))
    if checkpointing:
        y: Tensor = checkpoint(causal_attention, q, k, v, use_reentrant=False)
    else:
        y = causal_attention(q, k, v)
    assert {p() is None for p in made} == {checkpointing}
    y.sum().backward()
    del y
    assert all(p() is None for p in made)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_model_has_the_same_gradients_with_both(
    positions: Literal["learned", "rotary"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where queries and keys are turned and normalised first."""
    config = ModelConfig(1, 2, 48, 40, 64, positions=positions, qk_norm=positions == "rotary")
    windows = torch.arange(2 * 41).view(2, 41) * 7 % 64
    gradients: list[list[Tensor]] = []
    for smallest in (1, 10**6):
        monkeypatch.setattr(attention, "SMALLEST", smallest)
        torch.manual_seed(1)
        model = GPT(config)
        model(windows[:, :-1], windows[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert any(not torch.equal(*pair) for pair in zip(*gradients, strict=True))
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-6)


class Nothing(AssertionError):
    """oneDNN was asked."""


@pytest.mark.parametrize("why", ["dropout", "small", "threads", "double"])
def test_what_it_is_not_for_is_torchs(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise Nothing

    monkeypatch.setattr(attention, "times", refuse)
    q, k, v = (values(1, 2, 16, 8, seed=i) for i in range(3))
    with pytest.raises(Nothing):
        causal_attention(q, k, v)
    if why == "small":
        monkeypatch.setattr(attention, "SMALLEST", 16 * 8 + 1)
    if why == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    if why == "double":
        q, k, v = q.double(), k.double(), v.double()
    dropout = 0.5 if why == "dropout" else 0.0
    torch.manual_seed(1)
    ours = causal_attention(q, k, v, dropout)
    torch.manual_seed(1)
    theirs = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    assert torch.equal(ours, theirs)
