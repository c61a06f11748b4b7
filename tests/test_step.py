"""The canonical sum: one result, bit for bit, for every number of workers."""

import hashlib
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import WAYS, on_workers, only
from hypothesis import given
from hypothesis import strategies as st

from raygpt.config import ModelConfig, OptimConfig
from raygpt.data.hashes import lane_hash
from raygpt.data.order import Segments
from raygpt.data.stream import StepWindows
from raygpt.model import GPT
from raygpt.optim import build_optimizer, set_lr
from raygpt.train import reduce
from raygpt.train.step import Stepper
from raygpt.train.sums import tree_sum
from raygpt.train.tree import LaneForest, Node, reduce_plan

LANES, STEPS, MICRO, LR, CLIP, SEED = 8, 5, 2, 1e-2, 0.5, 7
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=72, dropout=0.1)
MODERN = replace(
    MODEL, positions="rotary", norm="rms", qk_norm=True, activation="relu2", bias=False
)
SMALL_MB = 0.01
"""Some parameters are larger, and the others are several buckets."""
SEGMENTS = Segments(3, 3 + STEPS, 2, LANES)


def windows(step: int, lane: int) -> np.ndarray:
    """A lane's windows; more in later steps, as under a ramp, and not divisible by MICRO."""
    generator = np.random.default_rng((step, lane))
    return generator.integers(0, 65, (step - 1, MODEL.block_size + 1)).astype(np.uint16)


def build(modern: bool = False) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(SEED)
    model = GPT(MODERN if modern else MODEL, 65)
    return model, build_optimizer(model, OptimConfig(matrices="muon" if modern else "adamw"))


def weights(model: GPT) -> str:
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(data).hexdigest()


def train(poisoned_step: int = -1, modern: bool = False, way: str = "memory") -> list[Any]:
    """A few steps on this process's lanes: of each its loss, norm and hash; then the weights."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, optimizer = build(modern)
    with patch.multiple(reduce, BUCKET_MB=SMALL_MB, LARGE_MB=SMALL_MB):
        ddp = reduce.data_parallel(model)
    with only(way):
        stepper = Stepper(
            model, ddp, optimizer, lanes=LANES, micro=MICRO, grad_clip=CLIP,
            device=torch.device("cpu"), dtype=torch.float32, seed=SEED,
        )  # fmt: skip
    seen: list[Any] = []
    for step in range(SEGMENTS.start, SEGMENTS.stop):
        segment = SEGMENTS.of_step(step)
        owners = SEGMENTS.owners(segment, world_size)
        lanes = {lane: windows(step, lane) for lane in range(LANES) if owners[lane] == rank}
        if step == poisoned_step and rank == 0:
            with torch.no_grad():  # an inf in the forward pass of one worker only
                keep = model.transformer.ln_f.weight.clone()
                model.transformer.ln_f.weight.fill_(float("inf"))
        result = stepper.gradient(StepWindows(step, segment, lanes), owners)
        stepper.update(result, LR)
        if step == poisoned_step and rank == 0:
            with torch.no_grad():
                model.transformer.ln_f.weight.copy_(keep)
        seen.append((result.loss, result.grad_norm, result.lane_hashes, result.skipped))
    return [*seen, weights(model)]


def reference() -> list[Any]:
    """The same steps without DDP, processes or in-place sums: the definition, written out."""
    model, optimizer = build()
    parameters = list(model.parameters())

    def lane_gradient(step: int, lane: int) -> tuple[list[torch.Tensor], float]:
        from raygpt.train.step import _dropout_seed

        torch.manual_seed(_dropout_seed(SEED, step, lane))
        model.zero_grad(set_to_none=True)
        mine, total = windows(step, lane), 0.0
        for begin in range(0, len(mine), MICRO):
            micro = torch.from_numpy(mine[begin : begin + MICRO].astype(np.int64))
            loss = model(micro[:, :-1], micro[:, 1:])
            (loss * (len(micro) / len(mine) / LANES)).backward()
            total += loss.double().item() * (len(micro) / len(mine))
        return [p.grad.clone() for p in parameters if p.grad is not None], total

    def tree(gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        if len(gradients) == 1:
            return gradients[0]
        half = len(gradients) // 2  # lanes that differ in the top bit are added first
        pairs = zip(gradients[:half], gradients[half:], strict=True)
        return tree([[a + b for a, b in zip(x, y, strict=True)] for x, y in pairs])

    seen: list[Any] = []
    for step in range(SEGMENTS.start, SEGMENTS.stop):
        results = [lane_gradient(step, lane) for lane in range(LANES)]
        for parameter, gradient in zip(parameters, tree([g for g, _ in results]), strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP).item()
        set_lr(optimizer, LR)
        optimizer.step()
        hashes = [lane_hash(windows(step, lane)) for lane in range(LANES)]
        loss = sum(loss for _, loss in results) / LANES
        seen.append((pytest.approx(loss, rel=1e-12), norm, tuple(hashes), False))
    return [*seen, weights(model)]


@pytest.fixture(scope="module")
def one_worker() -> list[Any]:
    (result,) = on_workers(1, train)
    return result


def test_buckets_and_large_parameters_are_tried() -> None:
    model, _ = build()
    sizes = [parameter.nbytes for parameter in model.parameters()]
    limit = SMALL_MB * 2**20
    assert sum(size > limit for size in sizes) > 3
    assert sum(size for size in sizes if size <= limit) > 2 * limit


def test_one_worker_computes_the_definition(one_worker: list[Any]) -> None:
    torch.set_num_threads(1)
    assert one_worker == reference()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 7, 8])
def test_every_number_of_workers_gives_the_same_bits(
    world_size: int, way: str, one_worker: list[Any]
) -> None:
    assert on_workers(world_size, train, -1, False, way) == [one_worker] * world_size


def test_the_modern_recipe_keeps_its_bits(one_worker: list[Any]) -> None:
    (alone,) = on_workers(1, train, -1, True)
    assert alone[-1] != one_worker[-1]
    for world_size, way in ((2, "memory"), (3, "network"), (5, "memory"), (8, "network")):
        assert on_workers(world_size, train, -1, True, way) == [alone] * world_size


def test_a_step_that_is_not_finite_is_skipped_by_all(one_worker: list[Any]) -> None:
    results = on_workers(2, train, SEGMENTS.start + 2)
    # The losses differ in their NaN; compare what can be compared.
    first, second = ([row[1:] if isinstance(row, tuple) else row for row in r] for r in results)
    assert repr(first) == repr(second)
    assert [row[3] for row in results[0][:-1]] == [False, False, True, False, False]
    # Later steps did go on, from weights that the skipped step left alone.
    assert results[0][:2] == one_worker[:2]
    assert all(np.isfinite(row[0]) for row in results[0][3:-1])


@given(bits=st.integers(0, 5), data=st.data())
def test_forests_cover_the_lanes(bits: int, data: st.DataObject) -> None:
    total = 2**bits
    owners = data.draw(st.lists(st.integers(0, 6), min_size=total, max_size=total))
    ranks = {rank: i for i, rank in enumerate(sorted(set(owners)))}
    plan = reduce_plan(tuple(ranks[r] for r in owners), 0, len(ranks))

    def lanes_of(node: Node) -> set[int]:
        level, index = node
        return set(range(index, total, total >> level))

    covered = [lane for parts in plan.parts for node in parts for lane in lanes_of(node)]
    assert sorted(covered) == list(range(total))
    for rank, parts in enumerate(plan.parts):
        mine = {lane for lane in range(total) if ranks[owners[lane]] == rank}
        assert set().union(*(lanes_of(node) for node in parts)) == mine
        # No two parts are siblings: they would have been added up.
        assert all((level, index ^ (total >> (level + 1))) not in parts or level == bits
                   for level, index in parts)  # fmt: skip


@given(bits=st.integers(0, 4), data=st.data())
def test_any_split_gives_the_same_sum(bits: int, data: st.DataObject) -> None:
    total = 2**bits
    values = torch.randn(total, 5, generator=torch.Generator().manual_seed(bits))
    whole = tree_sum({(0, lane): values[lane].clone() for lane in range(total)}, total)
    mine = data.draw(st.sets(st.integers(0, total - 1)))
    nodes: dict[Node, torch.Tensor] = {}
    for lanes in (mine, set(range(total)) - mine):
        forest = LaneForest(sorted(lanes), total)
        waiting: dict[Node, torch.Tensor] = {}
        for lane in forest.order:
            value = values[lane].clone()
            for node in forest.merges[lane]:
                value = value + waiting.pop(node)
            waiting[forest.nodes[lane]] = value
        assert list(waiting) == forest.roots
        nodes |= waiting
    assert torch.equal(tree_sum(nodes, total), whole)
