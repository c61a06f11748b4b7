"""The plain reader gives the tokens that the order asks for, or says what is wrong."""

import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygpt.config import BatchConfig, Config, DataConfig, ModelConfig, TrainConfig
from raygpt.data.corpus import Corpus, open_corpus
from raygpt.data.order import permutation
from raygpt.data.prepare import prepare
from raygpt.data.reader import ReadPlan, WindowReader, shared_reader
from raygpt.errors import UserError

LANES = 4
EPOCHS = 5  # more than 400 steps of plan_of; no test goes further
Windows = list[np.ndarray]


def plan_of(corpus: Corpus, ramp: bool = False, block_size: int = 64) -> ReadPlan:
    """Windows of 64 tokens: about 1,400 an epoch, which are 88 steps of the full batch."""
    return ReadPlan(
        corpus=corpus.path,
        fingerprint=corpus.fingerprint,
        seed=3,
        lanes=LANES,
        block_size=block_size,
        windows=4,
        start_windows=1 if ramp else 0,
        ramp_tokens=20_000 if ramp else 0,
    )


@cache
def raw_chunks(corpus: Corpus) -> tuple[np.ndarray, ...]:
    """tiny_corpus from its text, cut as the manifest says: end-of-text, then a token a byte."""
    text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()[:90_000]
    tokens = np.concatenate(([256], np.frombuffer(text, np.uint8))).astype(np.uint16)
    ends = np.cumsum([chunk.tokens for chunk in corpus.chunks("train")])
    assert ends[-1] == len(tokens)
    return tuple(np.split(tokens, ends[:-1]))


def lane_epoch(chunks: Sequence[np.ndarray], plan: ReadPlan, lane: int, epoch: int) -> Windows:
    """One epoch of a lane, in full: slices of T+1 tokens, by the words of the design."""
    T = plan.block_size
    pieces = [
        [tokens[w * T : w * T + T + 1] for w in range(len(tokens)) if w * T + T < len(tokens)]
        for tokens in chunks
    ]
    filled = [number for number, windows in enumerate(pieces) if windows]
    found = []
    for place in permutation(len(filled), plan.seed, 1, epoch)[lane :: plan.lanes].tolist():
        number = filled[place]
        inside = permutation(len(pieces[number]), plan.seed, 2, epoch, number).tolist()
        found += [pieces[number][w] for w in inside]
    return found


@cache
def lane_epochs(corpus: Corpus, plan: ReadPlan, lane: int) -> list[Windows]:
    """The first epochs of a lane of tiny_corpus."""
    return [lane_epoch(raw_chunks(corpus), plan, lane, epoch) for epoch in range(EPOCHS)]


def batch_sizes(plan: ReadPlan, steps: int) -> list[int]:
    """Windows of a lane in each step, by the formula of the ramp, summed step by step."""
    sizes, seen = [], 0
    for _ in range(steps):
        g = plan.windows
        if seen < plan.ramp_tokens:
            g0 = plan.start_windows
            g = g0 + (g - g0) * seen // plan.ramp_tokens
        sizes.append(g)
        seen += g * plan.lanes * plan.block_size
    return sizes


def expected(corpus: Corpus, plan: ReadPlan, lane: int, first: int, stop: int) -> np.ndarray:
    """What the reader must return for steps ``first`` to ``stop`` of tiny_corpus."""
    sizes = batch_sizes(plan, stop)
    sequence = list(chain(*lane_epochs(corpus, plan, lane)))
    windows = sequence[sum(sizes[:first]) : sum(sizes)]
    assert len(sequence) >= sum(sizes), "more epochs are needed here"
    return np.array(windows, np.uint16).reshape(-1, plan.block_size + 1)


def fails(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


@pytest.fixture
def copy(tiny_corpus: Corpus, tmp_path: Path) -> Path:
    """The same corpus in a folder that a test may damage."""
    return Path(shutil.copytree(tiny_corpus.path, tmp_path / "corpus"))


# The windows.


@settings(max_examples=60, deadline=None)
@given(
    lane=st.integers(0, LANES - 1),
    first=st.integers(0, 320),
    steps=st.integers(0, 60),
    ramp=st.booleans(),
)
def test_windows_are_slices_of_the_text(
    tiny_corpus: Corpus, lane: int, first: int, steps: int, ramp: bool
) -> None:
    """Window w of a chunk is its tokens wT to wT+T; which ones, the permutations say."""
    plan = plan_of(tiny_corpus, ramp)
    found = WindowReader(plan).read(lane, first, first + steps)
    np.testing.assert_array_equal(found, expected(tiny_corpus, plan, lane, first, first + steps))


@settings(max_examples=30, deadline=None)
@given(
    lane=st.integers(0, LANES - 1),
    cuts=st.lists(st.integers(0, 320), min_size=3, max_size=6).map(sorted),
    ramp=st.booleans(),
)
def test_reading_in_pieces_is_reading_at_once(
    tiny_corpus: Corpus, lane: int, cuts: list[int], ramp: bool
) -> None:
    """Wherever steps are cut into segments, and whether one reader reads them or several."""
    plan = plan_of(tiny_corpus, ramp)
    reader = WindowReader(plan)
    # Backwards, so that no piece can live on what the one before it left behind.
    pieces = [reader.read(lane, cuts[i], cuts[i + 1]) for i in reversed(range(len(cuts) - 1))]
    whole = WindowReader(plan).read(lane, cuts[0], cuts[-1])
    np.testing.assert_array_equal(np.concatenate(pieces[::-1]), whole)
    assert len(whole) == sum(batch_sizes(plan, cuts[-1])[cuts[0] :])


@pytest.mark.parametrize("lane", range(LANES))
def test_an_epoch_ends_inside_a_step(tiny_corpus: Corpus, lane: int) -> None:
    """The batch goes on with the next epoch's first windows; each lane has an end of its own."""
    plan = plan_of(tiny_corpus)
    old, new, *_ = lane_epochs(tiny_corpus, plan, lane)
    g = next(g for g in range(3, 20) if len(old) % g)
    step, rest = divmod(len(old), g)
    found = WindowReader(replace(plan, windows=g)).read(lane, step, step + 1)
    np.testing.assert_array_equal(found, [*old[-rest:], *new[: g - rest]])


def test_an_epoch_has_every_token_but_the_tails(tiny_corpus: Corpus) -> None:
    """All lanes together read each target of the text once, short of under T in a chunk."""
    plan = replace(plan_of(tiny_corpus), windows=1)
    reader = WindowReader(plan)
    found = []
    for lane in range(LANES):
        steps = len(lane_epochs(tiny_corpus, plan, lane)[0])
        found += [row[1:].tobytes() for row in reader.read(lane, 0, steps)]
    text = []
    for chunk in raw_chunks(tiny_corpus):
        targets = chunk[1:]
        whole = len(targets) // 64 * 64
        text += [row.tobytes() for row in targets[:whole].reshape(-1, 64)]
    assert sorted(found) == sorted(text)
    assert len(text) * 64 > 0.97 * tiny_corpus.tokens("train")


def test_result_is_an_array_of_the_corpus_type(tiny_corpus: Corpus) -> None:
    """(windows, T + 1), whole, writeable and the caller's own; no steps give no windows."""
    reader = WindowReader(plan_of(tiny_corpus))
    found = reader.read(1, 2, 9)
    assert (found.shape, found.dtype) == ((7 * 4, 65), np.uint16)
    assert reader.dtype == np.uint16
    assert found.flags.c_contiguous and found.flags.writeable and found.flags.owndata
    again = found.copy()
    found[:] = 0
    np.testing.assert_array_equal(reader.read(1, 2, 9), again)
    empty = reader.read(1, 9, 9)
    assert (empty.shape, empty.dtype) == ((0, 65), np.uint16)


def test_chunks_too_short_for_a_window_are_passed_over(tiny_corpus: Corpus) -> None:
    """Only the last chunk is shorter than the windows here: one step less makes an epoch."""
    *full, last = raw_chunks(tiny_corpus)
    size = len(full[0])
    assert {len(chunk) for chunk in full} == {size} and len(last) < size
    plan = replace(plan_of(tiny_corpus, block_size=size - 1), lanes=1, windows=1)
    reader = WindowReader(plan)
    found = reader.read(0, 0, len(full))
    assert sorted(row.tobytes() for row in found) == sorted(chunk.tobytes() for chunk in full)
    assert (reader.epoch(len(full) - 1), reader.epoch(len(full))) == (0, 1)


def test_short_chunks_between_others(tmp_path: Path) -> None:
    """Chunks are numbered with the empty ones counted: the right ones are read past them."""
    for number, length in enumerate([60, 9, 75, 10, 90, 5, 120, 40, 33, 8]):
        text = "".join(chr(97 + (number * 7 + i * i) % 26) for i in range(length))
        (tmp_path / f"{number}.txt").write_text(text)
    output = str(tmp_path / "corpus")
    prepare(
        [str(tmp_path / "*.txt")], output, "bytes",
        val_fraction=0.01, fragment_bytes=1, on_ray=False,
    )  # fmt: skip
    corpus = open_corpus(output)
    chunks = tuple(corpus.read_chunk("train", i) for i in range(len(corpus.chunks("train"))))
    short = [len(chunk) <= 16 for chunk in chunks]
    assert not all(short[short.index(True) :]), "no short one lies before others"
    plan = replace(plan_of(corpus, block_size=16), lanes=2, windows=1)
    for lane in range(2):
        windows = [w for e in range(3) for w in lane_epoch(chunks, plan, lane, e)]
        np.testing.assert_array_equal(WindowReader(plan).read(lane, 0, len(windows)), windows)


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 320), ramp=st.booleans())
def test_the_epoch_of_a_step(tiny_corpus: Corpus, step: int, ramp: bool) -> None:
    """It is that of the first window that lane 0 gives to the step."""
    plan = plan_of(tiny_corpus, ramp)
    position = sum(batch_sizes(plan, step))
    ends = np.cumsum([len(windows) for windows in lane_epochs(tiny_corpus, plan, 0)])
    assert position < ends[-1]
    assert WindowReader(plan).epoch(step) == int((ends <= position).sum())


def test_the_epoch_at_its_first_window(tiny_corpus: Corpus) -> None:
    """One window a step: the epoch changes exactly where lane 0 begins anew."""
    plan = replace(plan_of(tiny_corpus), windows=1)
    reader = WindowReader(plan)
    first, second, *_ = np.cumsum([len(e) for e in lane_epochs(tiny_corpus, plan, 0)]).tolist()
    steps = [0, first - 1, first, second - 1, second]
    assert [reader.epoch(step) for step in steps] == [0, 0, 1, 1, 2]


# The plan.


def test_the_plan_of_a_config(tiny_corpus: Corpus) -> None:
    """Tokens become windows of a lane; the seed is that of the data."""
    config = Config(
        data=DataConfig(seed=11),
        train=TrainConfig(seed=12),
        model=ModelConfig(block_size=32, n_layer=1, n_head=1, n_embd=8),
        batch=BatchConfig(tokens=5120, lanes=8, ramp_start_tokens=512, ramp_tokens=70_000),
    )
    plan = ReadPlan.from_config(config, tiny_corpus)
    assert plan == ReadPlan(
        corpus=tiny_corpus.path,
        fingerprint=tiny_corpus.fingerprint,
        seed=11,
        lanes=8,
        block_size=32,
        windows=20,
        start_windows=2,
        ramp_tokens=70_000,
    )
    schedule = WindowReader(plan).schedule
    assert (schedule.tokens(0), schedule.tokens(10**6)) == (512, 5120)
    constant = replace(config, batch=BatchConfig(tokens=5120, lanes=8))
    schedule = ReadPlan.from_config(constant, tiny_corpus).schedule()
    assert (schedule.tokens(0), schedule.tokens(10**6)) == (5120, 5120)


def test_a_plan_is_a_small_value(tiny_corpus: Corpus) -> None:
    """It travels with every read task, and names the one reader that a process keeps."""
    plan = plan_of(tiny_corpus, ramp=True)
    data = pickle.dumps(plan)
    twin = pickle.loads(data)
    assert twin == plan and twin is not plan and hash(twin) == hash(plan)
    assert len(data) < 1000
    others = [replace(plan, seed=4), replace(plan, lanes=2), replace(plan, ramp_tokens=20_001)]
    assert len({plan, twin, *others}) == 4
    reader = shared_reader(plan)
    assert shared_reader(twin) is reader and reader.plan == plan
    assert shared_reader(others[0]) is not reader
    assert shared_reader(others[0]).plan.seed == 4


def test_seeds_give_other_batches(tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    batches = {WindowReader(replace(plan, seed=s)).read(0, 0, 1).tobytes() for s in range(5)}
    assert len(batches) == 5


# What goes wrong.


def test_a_corpus_that_was_changed_is_refused(copy: Path, tmp_path: Path) -> None:
    """One byte of the text is another: the message has both fingerprints and the folder."""
    plan = plan_of(open_corpus(str(copy)))
    assert len(WindowReader(plan).read(0, 0, 1)) == 4
    shutil.rmtree(copy)
    text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()[:100_000]
    (tmp_path / "text.txt").write_bytes(text.replace(b"First", b"first", 1))
    prepare([str(tmp_path / "text.txt")], str(copy), "bytes", val_fraction=0.1, on_ray=False)
    new = open_corpus(str(copy)).fingerprint
    assert new != plan.fingerprint
    assert fails(lambda: WindowReader(plan)) == (
        f"corpus {copy} was changed: its fingerprint is {new[:12]}, this run began with "
        f"{plan.fingerprint[:12]}; restore it, or start a run of another name"
    )


def test_a_corpus_that_was_moved_is_the_same(tiny_corpus: Corpus, copy: Path) -> None:
    """What counts is the data: from another folder come the same windows."""
    plan = plan_of(tiny_corpus)
    moved = WindowReader(replace(plan, corpus=str(copy)))
    np.testing.assert_array_equal(moved.read(2, 80, 100), expected(tiny_corpus, plan, 2, 80, 100))


def test_a_damaged_shard_stops_the_lane_that_reads_it(tiny_corpus: Corpus, copy: Path) -> None:
    """The message names the file and the row group; what is whole can still be read."""
    corpus = open_corpus(str(copy))
    file = copy / corpus.chunks("train")[0].shard
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0xFF
    file.write_bytes(content)
    plan = replace(plan_of(corpus), windows=1)
    reader = WindowReader(plan)
    messages = []
    for lane in range(LANES):
        windows = lane_epochs(tiny_corpus, plan, lane)[0]
        try:
            found = reader.read(lane, 0, len(windows))
        except UserError as error:
            messages.append(str(error))
        else:
            np.testing.assert_array_equal(found, windows)
    assert len(messages) == 1
    assert re.search(rf"{re.escape(str(file))}, row group \d+\b", messages[0])


def test_a_missing_shard_is_named(copy: Path) -> None:
    corpus = open_corpus(str(copy))
    file = copy / corpus.chunks("train")[0].shard
    file.unlink()
    reader = WindowReader(plan_of(corpus))
    assert f"cannot read {file}, row group " in fails(lambda: reader.read(0, 0, 1))


def test_a_missing_corpus_is_named(tiny_corpus: Corpus, tmp_path: Path) -> None:
    plan = replace(plan_of(tiny_corpus), corpus=str(tmp_path / "none"))
    assert f"corpus {tmp_path}/none does not exist" in fails(lambda: WindowReader(plan))


def test_too_few_chunks_for_the_lanes(tiny_corpus: Corpus) -> None:
    """As many lanes as chunks are possible, one more is not."""
    plan, n = plan_of(tiny_corpus), len(tiny_corpus.chunks("train"))
    assert len(WindowReader(replace(plan, lanes=n)).read(n - 1, 0, 1)) == 4
    message = fails(lambda: WindowReader(replace(plan, lanes=n + 1)))
    assert f"the corpus has {n} chunks that hold a window" in message
    assert f"fewer than batch.lanes {n + 1}" in message
