"""Other windows than those that were due: named by step, lane, shard and window."""

from pathlib import Path

import numpy as np
import pytest
from audited import LANES, Run, T, Windows
from audited import corpus_path as corpus_path
from audited import run as run

from raygpt.data.order import DataOrder, windows_in
from raygpt.data.reader import cut


def test_a_batch_used_twice(run: Run) -> None:
    run.play({(17, 1): run.windows(16, 1)})
    run.save()
    assert run.wrong() == [
        f"step 17, lane 1 used the windows of step 16 again: {run.text(16, 1)} used twice, "
        f"those of step 17 never ({run.text(17, 1)})"
    ]


def test_a_stream_one_step_behind(run: Run) -> None:
    """All lanes, from step 20 to the end: one batch twice, the last one never."""
    late = {(s, lane): run.windows(s - 1, lane) for s in range(20, 30) for lane in range(LANES)}
    run.play(late)
    run.save()
    (line,) = run.wrong()
    assert line.startswith(
        "steps 20 to 29, all lanes used the windows of steps 19 to 28 again: "
        f"{run.text(19, 0)}, {run.text(19, 1)} used twice, those of step 29 never "
    )


def test_a_skipped_batch(run: Run) -> None:
    """Lane 0 is a step ahead from step 25 on: its last batch is one that was not due yet."""
    run.play({(s, 0): run.windows(s + 1, 0) for s in range(25, 30)})
    run.save()
    assert run.wrong() == [
        "steps 25 to 29, lane 0 used the windows of steps 26 to 30: "
        f"those of step 25 never ({run.text(25, 0)})"
    ]


def test_lanes_swapped(tmp_path: Path, corpus_path: Path) -> None:
    """Two of four, for two steps."""
    run = Run(tmp_path, corpus_path, steps=15, tokens=4 * T * 4, lanes=4)
    swapped = {(s, a): run.windows(s, b) for s in (5, 6) for a, b in ((1, 3), (3, 1))}
    run.play(swapped)
    run.save()
    assert run.wrong() == [
        "steps 5, 6, lanes 1, 3 used each other's windows: each window once, but not in its place"
    ]


def test_lanes_in_a_ring(tmp_path: Path, corpus_path: Path) -> None:
    run = Run(tmp_path, corpus_path, steps=15, tokens=4 * T * 4, lanes=4)
    run.play({(5, a): run.windows(5, b) for a, b in ((0, 1), (1, 2), (2, 0))})
    run.save()
    assert run.wrong() == [
        "step 5, lanes 0 to 2 used the windows of lanes 1, 2, 0: each window once, but not in its "
        "place"
    ]


def test_a_lane_in_the_place_of_another(run: Run) -> None:
    run.play({(5, 0): run.windows(8, 1)})
    run.save()
    assert run.wrong() == [
        f"step 5, lane 0 used the windows of step 8, lane 1: {run.text(8, 1)} used twice, "
        f"those of step 5 never ({run.text(5, 0)})"
    ]


def test_a_cut_batch(run: Run) -> None:
    run.play({(29, 1): run.windows(29, 1)[:3]})
    run.save()
    assert run.wrong() == [
        "step 29, lane 1 used only the first 3 of 4 windows: those of step 29 never "
        f"({run.text(29, 1, 3)})"
    ]


def test_a_window_left_out(run: Run) -> None:
    """What follows moves up by one, until the end."""
    sequence = np.delete(run.reader.read(0, 10, 31), 2, axis=0)
    run.play({(10 + i, 0): sequence[4 * i : 4 * i + 4] for i in range(20)})
    run.save()
    assert run.wrong() == [
        "step 10, lane 0 left out a window and used the next step's first: "
        f"those of step 10 never ({run.text(10, 0, 2, 3)})",
        "steps 11 to 29, lane 0 used windows 1 window ahead of their place: "
        "each window once, but not in its place",
    ]


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ([0, 1, 1, 2], "used a window twice and left out the last: {1} used twice, {3} never"),
        ([0, 1, 0, 3], "used a window of the batch in the place of another: {0} used twice, "
                       "{2} never"),
        ([3, 2, 1, 0], "used the right windows in another order: each window once, but not in "
                       "its place"),
        ([2, 1, 0, 3], "used the right windows in another order: each window once, but not in "
                       "its place"),
    ],
)  # fmt: skip
def test_a_batch_in_disorder(run: Run, indices: list[int], told: str) -> None:
    run.play({(12, 1): run.windows(12, 1)[indices]})
    run.save()
    places = [run.text(12, 1, index, index + 1) for index in range(4)]
    told = told.replace("{2} never", "those of step 12 never ({2})")
    told = told.replace("{3} never", "those of step 12 never ({3})")
    assert run.wrong() == [f"step 12, lane 1 {told.format(*places)}"]


def test_a_changed_window(run: Run) -> None:
    changed = run.windows(9, 0).copy()
    changed[2, 5] += 1
    run.play({(9, 0): changed})
    run.save()
    (line,) = run.wrong()
    assert line == f"step 9, lane 0 used unknown windows instead of {run.text(9, 0)}"


def test_the_search_is_bounded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beyond is unknown, and it is said that it was not looked for."""
    monkeypatch.setattr("raygpt.audit.explain.MAX_SEARCHES", 2)
    changed = {(s, 0): run.windows(s, 0)[:2] for s in (8, 10, 12)}
    run.play(changed)
    run.save()
    report = run.audit()
    assert ["used only the first 2 of 4" in line for line in run.wrong()] == [True, True, False]
    assert run.wrong()[2] == f"step 12, lane 0 used unknown windows instead of {run.text(12, 0)}"
    (note,) = report.findings.notes
    assert note.startswith("parts of batches were looked for in the first ")


def shard_without(run: Run) -> tuple[str, list[int]]:
    """A shard of the training split, and the chunks of all others."""
    corpus = run.reader._corpus
    shard = corpus.shards("train")[2].name
    return shard, [i for i, c in enumerate(corpus.chunks("train")) if c.shard != shard]


@pytest.mark.parametrize("first", [0, 12])
@pytest.mark.parametrize("numbered", [True, False])
def test_an_order_without_a_shard(run: Run, first: int, numbered: bool) -> None:
    """The order of a corpus that lacks a shard, its chunks numbered anew or not."""
    shard, kept = shard_without(run)
    corpus = run.reader._corpus
    sizes = [windows_in(chunk.tokens, T) for chunk in corpus.chunks("train")]
    some = [sizes[i] if i in kept else 0 for i in range(len(sizes))]
    order = DataOrder([sizes[i] for i in kept] if numbered else some, LANES, run.job.plan.seed)
    names = kept if numbered else list(range(len(sizes)))

    def windows(step: int, lane: int) -> np.ndarray:
        spans = order.spans(lane, 4 * step, 4 * step + 4)
        return np.concatenate(
            [cut(corpus.read_chunk("train", names[chunk]), found, T) for chunk, found in spans]
        )

    run.play({(s, lane): windows(s, lane) for s in range(first, 30) for lane in range(LANES)})
    run.save()
    (line,) = run.wrong()
    count = sum(sizes) - sum(sizes[i] for i in kept)
    assert line == (
        f"from step {first} on lanes follow an order without shard {shard}: its {count} windows "
        f"were skipped (steps {first} to 29)"
    )


@pytest.mark.parametrize("whole", [True, False])
def test_a_sequence_without_a_shard_or_a_chunk(
    tmp_path: Path, corpus_path: Path, whole: bool
) -> None:
    """The order is the run's, but a shard, or one chunk, is passed over."""
    run = Run(tmp_path, corpus_path, steps=100)
    corpus = run.reader._corpus
    chunks = corpus.chunks("train")
    shard, kept = shard_without(run)
    gone = [i for i in range(len(chunks)) if i not in kept]
    if not whole:
        gone = gone[:1]
    wrong: Windows = {}
    firsts: dict[int, int] = {}
    for lane in range(LANES):
        windows: list[np.ndarray] = []
        for chunk, found in run.reader.order.spans(lane, 0, 600):
            if chunk in gone:
                continue
            windows += list(cut(corpus.read_chunk("train", chunk), found, T))
        for step in range(100):
            used = np.stack(windows[4 * step : 4 * step + 4])
            if not np.array_equal(used, run.windows(step, lane)):
                wrong[step, lane] = used
                firsts.setdefault(lane, step)
    assert len(firsts) == 2 if whole else len(firsts) == 1
    run.play(wrong)
    run.save()
    (line,) = run.wrong()
    lanes = "all lanes" if whole else f"lane {min(firsts)}"
    name = f"shard {shard}" if whole else f"chunk 0 of shard {shard}"
    start = min(firsts.values())
    assert line.startswith(f"from step {start} on {lanes} went on without {name}: ")
    assert " never (" in line and f"of shard {shard}" in line.partition(" never (")[2]
    assert "used twice" not in line
