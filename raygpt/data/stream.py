"""The stream: blocks of windows that Ray Data carries to the workers of a run.

Each read task yields one block of one row: the windows of one (segment, lane), tagged.  Which lane
that is depends on the number of workers, which is known when the stream is split for them.  Ray
Data's output splitter gives the next block to the worker with the fewest rows, ties to the
lowest rank; with ``preserve_order`` and blocks of one row each, block b goes to rank b mod W,
so :meth:`raygpt.data.order.Segments.owners` knows every owner.  A worker reads segment 0
itself, while Ray Data starts, and checks the tags of all later blocks.

The stream is a transport, never the source of the order; ``reader.py`` is.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import DataContext, DataIterator, Dataset, ExecutionOptions
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.train import DataConfig

from raygpt.config import READER_CPUS
from raygpt.data.order import Segments
from raygpt.data.reader import ReadPlan, WindowReader, shared_reader

PACE_SECONDS = 0.05
"""A pause for each turn of Ray Data's loop."""
LONGEST_PAUSE_SECONDS = 1.0
_WORLD_SIZE = "raygpt.world_size"
"""Of what a dataset's context tells its tasks."""
_SCHEMA = pa.schema(
    [("lane", pa.int64()), ("first_step", pa.int64()), ("windows", pa.large_binary())]
)


class StreamError(RuntimeError):
    """Ray Data gave a worker a block that is not its own; going on would change the model."""


def read_block(plan: ReadPlan, lane: int, first: int, stop: int) -> list[pa.Table]:
    """The block of a lane's steps ``first`` to ``stop``; runs in a Ray Data task."""
    windows = shared_reader(plan).read(lane, first, stop)
    return [pa.table([[lane], [first], [windows.tobytes()]], schema=_SCHEMA)]


def read_turn(
    read: Callable[[int, int, int], list[pa.Table]], segments: Segments, segment: int, turn: int
) -> list[pa.Table]:
    """What ``read`` returns for the lane whose turn it is; runs in a Ray Data task."""
    world_size: int = DataContext.get_current().get_config(_WORLD_SIZE, 1)
    return read(segments.dealt(segment, world_size)[turn], *segments.bounds(segment))


class WindowSource(Datasource):
    """The blocks of segments 1, 2, ..., segment by segment, as they are dealt."""

    def __init__(self, plan: ReadPlan, segments: Segments, token_bytes: int) -> None:
        super().__init__()
        self._plan, self._segments, self._token_bytes = plan, segments, token_bytes

    def get_name(self) -> str:
        return "Windows"

    def estimate_inmemory_data_size(self) -> int:
        return sum(task.metadata.size_bytes or 0 for task in self.get_read_tasks(0))

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        schedule = self._plan.schedule()
        tasks = []
        for segment in range(1, self._segments.count):
            first, stop = self._segments.bounds(segment)
            windows = schedule.windows_before(stop) - schedule.windows_before(first)
            size = windows * (self._plan.block_size + 1) * self._token_bytes
            metadata = BlockMetadata(num_rows=1, size_bytes=size, input_files=None, exec_stats=None)
            tasks += [
                ReadTask(
                    partial(read_turn, partial(read_block, self._plan), self._segments, segment, t),
                    metadata,
                    _SCHEMA,
                )
                for t in range(self._plan.lanes)
            ]
        return tasks


def window_dataset(
    plan: ReadPlan, segments: Segments, token_bytes: int, readers: int = 2
) -> Dataset:
    """The dataset of all blocks after segment 0.

    Args:
        readers: read tasks at a time.  Their small CPU share would let ten of them start on every
            idle CPU, each a process whose imports take seconds of it.
    """
    blocks = max(0, segments.count - 1) * plan.lanes
    return ray.data.read_datasource(
        WindowSource(plan, segments, token_bytes),
        num_cpus=READER_CPUS,
        concurrency=readers,
        override_num_blocks=max(1, blocks),
    )


class Paced(ExecutionCallback):
    """Gives Ray Data's loop a pause: it waits for tasks that run, but while none does, since the
    workers have enough, it turns as fast as it can, for as long as the run lasts.

    A turn takes milliseconds from a worker, and the others wait for that one.  So where nothing
    has happened since the last turn, the pause doubles: it is about as long as the time for which
    nothing happened, and what happens next waits no longer than that.
    """

    def __init__(self) -> None:
        self._pause = PACE_SECONDS
        self._seen: list[tuple[int, int, int]] = []

    def on_execution_step(self, executor: Any) -> None:
        seen = [
            (op.num_active_tasks(), state.num_completed_tasks, state.total_enqueued_output_blocks())
            for op, state in executor._topology.items()
        ]
        resting = seen == self._seen and not any(active for active, *_ in seen)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS) if resting else PACE_SECONDS
        self._seen = seen
        time.sleep(self._pause)


class StreamConfig(DataConfig):
    """Splits without ``equal=True``, which drops rows at the end of a stream, and in order."""

    def __init__(self) -> None:
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        result: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options = self._resolve_execution_options(name)
            dataset.context.custom_execution_callback_classes = [Paced]
            dataset.context.set_config(_WORLD_SIZE, world_size)
            for rank, split in enumerate(dataset.streaming_split(world_size, equal=False)):
                result[rank][name] = split
        return result


@dataclass(frozen=True)
class StepWindows:
    """What one worker computes in one step: its lanes, each with its windows (g, T + 1)."""

    step: int
    segment: int
    lanes: dict[int, np.ndarray]


def lane_steps(
    reader: WindowReader,
    segments: Segments,
    rank: int,
    world_size: int,
    blocks: Iterator[pa.Table],
) -> Iterator[StepWindows]:
    """The windows of this worker's lanes, step after step, to the end of the run.

    Args:
        blocks: the worker's blocks of segments 1, 2, ...; :func:`stream_blocks` makes them.

    Raises:
        StreamError: a block is not the expected one, or blocks are missing.
        UserError: a shard is missing or damaged.
    """
    schedule = reader.schedule
    for segment in range(segments.count):
        first, stop = segments.bounds(segment)
        owners = segments.owners(segment, world_size)
        lanes: dict[int, np.ndarray] = {}
        dealt = segments.dealt(segment, world_size)
        for lane in (lane for lane in dealt if owners[lane] == rank):
            if segment == 0:
                lanes[lane] = reader.read(lane, first, stop)
            else:
                lanes[lane] = _windows_of(next(blocks, None), reader, lane, first)
        before = schedule.windows_before(first)
        for step in range(first, stop):
            begin, end = (schedule.windows_before(s) - before for s in (step, step + 1))
            part = {lane: windows[begin:end] for lane, windows in lanes.items()}
            if any(len(windows) != end - begin for windows in part.values()):
                raise StreamError(f"the block of step {step} is too short")
            yield StepWindows(step, segment, part)
            if segment == 0 and step == first and segments.count > 1:
                blocks = begun(blocks)  # after the first step, which it shall not hold up


def begun(blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same blocks, the first of which is fetched in the background from now on."""
    first: Future[pa.Table | None] = Future()

    def fetch() -> None:
        try:
            first.set_result(next(blocks, None))
        except BaseException as error:  # for the loop, which takes it in its own thread
            first.set_exception(error)

    def all_of_them() -> Iterator[pa.Table]:
        if (block := first.result()) is not None:
            yield block
            yield from blocks

    threading.Thread(target=fetch, name="stream", daemon=True).start()
    return all_of_them()


def _windows_of(block: pa.Table | None, reader: WindowReader, lane: int, first: int) -> np.ndarray:
    if block is None:
        raise StreamError(f"the stream ended before the block of lane {lane}, step {first}")
    found = [
        (row["lane"], row["first_step"]) for row in block.select(["lane", "first_step"]).to_pylist()
    ]
    if found != [(lane, first)]:
        raise StreamError(
            f"expected the block of lane {lane}, step {first}, got (lane, step) {found}; this "
            "release of Ray Data deals blocks in another way"
        )
    tokens = np.frombuffer(block.column("windows")[0].as_buffer(), reader.dtype)
    return tokens.reshape(-1, reader.plan.block_size + 1)


def stream_blocks(open_shard: Callable[[], DataIterator], ahead: int) -> Iterator[pa.Table]:
    """A worker's blocks, fetched in the background.

    Args:
        open_shard: gives the worker's share of the stream; called with the first ``next``, since
            it waits for a process that starts meanwhile.  Ray Data, too, starts only then.
        ahead: blocks to have before they are asked for.  Where workers fill a machine, Ray Data
            reads only what is asked for, and a segment needs all of a worker's at once.
    """
    yield from open_shard().iter_batches(
        batch_size=None,  # type: ignore[arg-type]  # whole blocks, as documented
        batch_format="pyarrow",
        prefetch_batches=ahead,
    )
