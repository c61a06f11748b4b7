"""The parts of the canonical sum that tests of whole steps do not single out."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import WAYS, on_workers, only
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raygpt.data.order import Segments
from raygpt.train import reduce
from raygpt.train.network import EXCHANGES_AHEAD, Network, gather
from raygpt.train.reduce import GradientSum
from raygpt.train.sums import slices_of, tree_sum
from raygpt.train.tree import Node, most_sums, reduce_plan


@given(bits=st.integers(0, 4), data=st.data())
def test_the_sum_may_end_up_in_any_summand(bits: int, data: st.DataObject) -> None:
    total = 2**bits
    values = torch.randn(total, 5, generator=torch.Generator().manual_seed(bits))
    whole = tree_sum({(0, lane): values[lane].clone() for lane in range(total)}, total)
    into: Node = (0, data.draw(st.integers(0, total - 1)))
    nodes: dict[Node, torch.Tensor] = {(0, lane): values[lane].clone() for lane in range(total)}
    found = tree_sum(nodes, total, into)
    assert torch.equal(found, whole)
    assert found is nodes[into]


def gathered(length: int, direct: bool) -> list[float]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    buffer = torch.full((length,), -1.0)
    slices = slices_of(buffer, world_size)
    slices[rank].fill_(rank)
    for work in gather(buffer, slices, rank, direct):
        work.wait()
    return buffer.tolist()


@pytest.mark.parametrize("direct", [True, False])
def test_everyone_gets_the_slices_of_all(direct: bool) -> None:
    assert on_workers(3, gathered, 8, direct) == [[0, 0, 1, 1, 2, 2, 2, 2]] * 3


def tiny(way: str) -> list[Any]:
    """Gradients of a model of two parameters, twice, with owners that change in between."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net = nn.Linear(1, 1)
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True)
    with only(way):
        gradients = GradientSum(ddp)
    seen: list[Any] = []
    for owners in [(0, 1, 2, 0), (2, 0, 1, 2)]:
        net.zero_grad(set_to_none=True)
        plan = reduce_plan(owners, rank, world_size)
        gradients.begin(plan)
        for lane in plan.lanes:
            last = lane == plan.lanes[-1]
            (ddp if last else net)(torch.tensor([[2.0**lane]])).sum().backward()
            if not last:
                gradients.add_lane(lane)
        gradients.finish()
        seen.append([p.grad.item() for p in net.parameters() if p.grad is not None])
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_more_workers_than_elements_and_owners_that_change(way: str) -> None:
    assert on_workers(3, tiny, way) == [[[15, 4], [15, 4]]] * 3


class Counting(Network):
    """Knows of how many buffers it kept the partial sums at once."""

    kept = buffers = 0

    def _start(self, *arguments: Any) -> Any:
        exchange = super()._start(*arguments)
        self.buffers = len(self._exchanges) + 1
        self.kept = max(self.kept, sum(bool(e.parts) for e in (*self._exchanges, exchange)))
        return exchange


def kept() -> tuple[int, int, int]:
    """Of a small model's backward pass: buckets, those whose partial sums were kept at once, and
    those whose sums were on their way back before it ended."""
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(12)))
    ddp = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=0.001)
    counting = Counting()
    with patch.object(reduce, "exchange", return_value=counting):
        gradients = GradientSum(ddp)
    for _ in range(2):  # DDP arranges its buckets after the first
        gradients.begin(reduce_plan((0, 1), dist.get_rank(), dist.get_world_size()))
        ddp(torch.ones(1, 16)).sum().backward()
        returning = sum(bool(e.returns) for e in counting._exchanges)
        gradients.finish()
    return counting.buffers, counting.kept, returning


def test_partial_sums_of_few_buckets_are_kept_at_once_and_those_before_are_on_their_way_back() -> (
    None
):
    for buckets, at_once, returning in on_workers(2, kept):
        assert at_once == EXCHANGES_AHEAD + 1 < buckets
        assert returning == buckets - at_once


def held(lanes: int) -> int:
    """Gradients that a worker holds at once, while a step goes from lane to lane."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    net = nn.Linear(1, 1)
    gradients = GradientSum(DistributedDataParallel(net, gradient_as_bucket_view=True))
    plan = reduce_plan(Segments(0, 1, 1, lanes).owners(0, world_size), rank, world_size)
    gradients.begin(plan)
    most = 0
    for lane in plan.lanes:
        most = max(most, len(gradients._waiting) + 1)
        net(torch.ones(1, 1)).sum().backward()
        gradients.add_lane(lane)
    return most


def test_how_many_gradients_a_worker_holds() -> None:
    assert max(on_workers(3, held, 32)) == 5 < most_sums(32, 3, 3) == 6  # of any segment
    assert on_workers(1, held, 32) == [most_sums(32, 1, 1)] == [6]
    assert most_sums(32, 32, 32) == 1


@pytest.mark.parametrize("lanes", [1, 2, 8, 32])
def test_a_worker_has_few_partial_sums_and_holds_no_more_than_one_alone(lanes: int) -> None:
    bits = lanes.bit_length() - 1
    for world_size in range(1, lanes + 1):
        segments = Segments(0, world_size + 1, 1, lanes)
        for segment in range(segments.count):
            parts = reduce_plan(segments.owners(segment, world_size), 0, world_size).parts
            most = max(map(len, parts))
            assert most == 1 if world_size.bit_count() == 1 else most <= bits
        assert most_sums(lanes, world_size, world_size) <= bits + 1


@pytest.mark.parametrize("lanes", [4, 32])
def test_of_many_numbers_of_workers_the_first_few_hold_the_most(lanes: int) -> None:
    held = [0, *(most_sums(lanes, w, w) for w in range(1, lanes + 1))]
    for fewest in range(1, lanes + 1):
        for most in range(fewest, lanes + 1):
            assert most_sums(lanes, fewest, most) == max(held[fewest : most + 1])
