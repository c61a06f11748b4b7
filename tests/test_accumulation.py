"""Gradient accumulation on a toy whose gradients are published."""

import pytest
import torch
from torch import Tensor, nn

# The first ten entries of the first layer's weight gradient.
PUBLISHED = [0.0953, 0.0498, -0.0077, -0.0817, -0.0166, 0.0079, 0.0189, 0.1085, 0.1615, -0.0739]


def _toy() -> tuple[nn.Sequential, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(1729)
    first = nn.Linear(16, 32)
    net = nn.Sequential(first, nn.GELU(), nn.Linear(32, 1))
    torch.random.manual_seed(42)
    return net, first, torch.randn(4, 16), torch.randn(4, 1)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_accumulated_gradients_are_the_published_ones(micro_batches: int) -> None:
    net, first, x, y = _toy()
    for inputs, targets in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        loss = nn.functional.mse_loss(net(inputs), targets) / micro_batches
        loss.backward()
    assert first.weight.grad is not None
    gradient = first.weight.grad.flatten()[:10].tolist()
    assert gradient == pytest.approx(PUBLISHED, abs=5.1e-5)  # printed with four decimals


def test_without_the_division_the_gradient_is_four_times_as_large() -> None:
    net, first, x, y = _toy()
    for inputs, targets in zip(x, y, strict=True):
        nn.functional.mse_loss(net(inputs), targets).backward()
    assert first.weight.grad is not None
    gradient = first.weight.grad.flatten()[:10].tolist()
    assert gradient == pytest.approx([4 * value for value in PUBLISHED], abs=2.1e-4)
