"""The model's GELU is torch's, and which blocks it is computed in makes no difference."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raygpt import gelu as module
from raygpt.gelu import gelu


def values(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def with_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of its sum, weighted with the numbers from 0 to 1."""
    leaf = x.clone().requires_grad_()
    y = gelu(leaf * 1)  # a leaf must not be overwritten
    (y.flatten() * torch.linspace(0, 1, y.numel(), dtype=y.dtype)).sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize(
    "x", [values(5, 7, 33), torch.tensor([-200.0, -9, -0.0, 0, 1e-30, 9, 200])]
)
def test_value_and_gradient_are_torchs(x: Tensor) -> None:
    exact = x.double().requires_grad_()
    y = F.gelu(exact, approximate="tanh")
    (y.flatten() * torch.linspace(0, 1, y.numel(), dtype=torch.float64)).sum().backward()
    ours, gradient = with_gradient(x)
    torch.testing.assert_close(ours, y.detach().float(), rtol=2e-6, atol=2e-6)
    assert exact.grad is not None
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-5, atol=1e-5)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what lies beside a value: workers have other micro-batches beside each other."""
    x = values(11, 160)  # what is left of two vectors, at most 32, torch computes in another way
    whole = with_gradient(x)
    for block in (32, 224, 1440):
        monkeypatch.setattr(module, "BLOCK", block)
        assert all(torch.equal(a, b) for a, b in zip(whole, with_gradient(x), strict=True))
    rows = torch.cat([gelu(row.clone()) for row in x]).view(x.shape)
    assert torch.equal(rows, whole[0])


def test_without_gradients_nothing_is_overwritten_and_bits_are_the_same() -> None:
    x = values(4, 100)
    before = x.clone()
    assert torch.equal(gelu(x), with_gradient(x)[0]) and torch.equal(x, before)


@pytest.mark.parametrize("x", [values(6, 6).bfloat16(), values(6, 6).T, values(6, 6).double()])
def test_what_it_is_not_for_is_torchs(x: Tensor) -> None:
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))


def test_a_second_backward_pass_is_refused() -> None:
    """The first one writes over what it would need."""
    y = gelu(values(6, 6).requires_grad_() * 1).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
