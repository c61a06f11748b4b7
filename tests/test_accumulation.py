"""Gradient accumulation, on a toy whose gradients are published."""

import pytest
import torch
from torch import Tensor, nn

from raygpt.train.step import Forward, accumulate

# The first ten entries of the first layer's weight gradient.
PUBLISHED = [0.0953, 0.0498, -0.0077, -0.0817, -0.0166, 0.0079, 0.0189, 0.1085, 0.1615, -0.0739]


def toy() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(1729)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
    torch.random.manual_seed(42)
    return net, torch.randn(4, 16), torch.randn(4, 1)


def gradient(sizes: list[int], weight: float = 1.0) -> tuple[list[float], float]:
    """The first ten gradients and the loss, in micro-batches of these sizes."""
    net, x, y = toy()

    def forward(inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(net(inputs), targets)

    micro_batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    loss = accumulate(forward, micro_batches, weight)
    grad = next(net.parameters()).grad
    assert grad is not None
    return grad.flatten()[:10].tolist(), loss.item()


@pytest.mark.parametrize("sizes", [[4], [1, 1, 1, 1], [3, 1]])
def test_accumulated_gradients_are_the_published_ones(sizes: list[int]) -> None:
    found, loss = gradient(sizes)
    assert found == pytest.approx(PUBLISHED, abs=5.1e-5)  # printed with four decimals
    net, x, y = toy()
    assert loss == pytest.approx(nn.functional.mse_loss(net(x), y).item(), rel=1e-6)


def test_a_lane_weighs_its_share() -> None:
    half, loss = gradient([2, 2], weight=0.5)
    whole, same = gradient([2, 2])
    assert [2 * value for value in half] == whole  # a power of two is exact
    assert loss == same


def test_the_last_micro_batch_may_go_another_way() -> None:
    """Through DDP, which exchanges gradients: once, after everything else."""
    net, x, y = toy()
    calls: list[str] = []

    def counted(name: str) -> Forward:
        def forward(inputs: Tensor, targets: Tensor) -> Tensor:
            calls.append(name)
            return nn.functional.mse_loss(net(inputs), targets)

        return forward

    parts = list(zip(x.split(1), y.split(1), strict=True))
    accumulate(counted("bare"), parts, 1.0, counted("ddp"))
    assert calls == ["bare", "bare", "bare", "ddp"]
