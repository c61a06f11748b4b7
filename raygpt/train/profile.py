"""Where the time of a step goes: traces and a table, for the steps that ``train.profile`` names.

Each worker writes a trace of torch's profiler, for https://ui.perfetto.dev or ``chrome://tracing``;
rank 0 also a table of milliseconds a step, by part and worker.  A part within another counts as
itself only, so with what is left they add up to the step.  ``exchange`` is what the worker itself
waits for and adds up, within the backward pass or after it; what is sent meanwhile takes no time
of its own.

What it gives up: speed, for these steps.  The profiler takes its time, and a GPU is waited for
after each part.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, record_function

from raygpt import device as devices
from raygpt.config import profiled_steps
from raygpt.storage import Folder, StorageError, patiently

PARTS = ("data", "forward", "backward", "exchange", "update")
REST = "rest"
FOLDER = "profile"
Part = Callable[[str], AbstractContextManager[object]]
"""Times what happens inside as one of :data:`PARTS`."""


class Profiler:
    """Profiles the steps that are asked for; otherwise it costs nothing.

    Args:
        steps: ``N:M``, or empty for none.
        run: the run's folder, which gets :data:`FOLDER`.
        patience: seconds for which a storage that refuses is tried again.
        say: told if it does, and if a file is not written in the end.
    """

    def __init__(
        self,
        steps: str,
        device: torch.device,
        run: Folder,
        patience: float,
        say: Callable[[str], None],
    ) -> None:
        self._steps, self._device, self._patience = profiled_steps(steps), device, patience
        self._say = say
        self._folder = run.child(FOLDER)
        self._torch: torch.profiler.profile | None = None
        self._spent: dict[str, float] = {}
        self._within = 0.0
        """Seconds that parts within the one at hand took."""
        self._profiled = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """One step of the loop, all of it."""
        if number not in self._steps:
            yield
            return
        if self._torch is None:
            self._begin()
        began = time.perf_counter()
        with record_function("step"):
            yield
            devices.wait(self._device)
        self._spent["step"] += time.perf_counter() - began
        self._profiled += 1
        if number + 1 == self._steps.stop:
            self._end()

    def part(self, name: str) -> AbstractContextManager[object]:
        """Times what happens inside, as one of :data:`PARTS`."""
        return nullcontext() if self._torch is None else self._timed(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        before, self._within = self._within, 0.0
        began = time.perf_counter()
        with record_function(name):
            yield
            devices.wait(self._device)
        took = time.perf_counter() - began
        self._spent[name] += took - self._within
        self._within = before + took

    def _begin(self) -> None:
        self._spent, self._profiled = dict.fromkeys((*PARTS, "step"), 0.0), 0
        self._within = 0.0
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._torch = torch.profiler.profile(activities=activities)
        self._torch.start()

    def _end(self) -> None:
        """All workers come here after the same step."""
        assert self._torch is not None
        self._torch.stop()
        last = self._steps.stop - 1
        name = f"steps_{last + 1 - self._profiled}_to_{last}"
        rank = dist.get_rank()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json.gz"
            self._torch.export_chrome_trace(str(path))
            self._write(f"{name}_rank_{rank}.json.gz", path.read_bytes())
        self._torch = None
        mine = {part: 1000 * spent / self._profiled for part, spent in self._spent.items()}
        rows: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(rows, mine)
        if rank == 0:
            self._write(f"{name}.md", table(rows).encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            patiently(lambda: self._folder.write_bytes(name, data), self._patience, self._say)
        except StorageError as error:  # what was trained is worth more
            self._say(f"no {name}: {error}")


def table(workers: list[dict[str, float]]) -> str:
    """Milliseconds a step by part, in Markdown: a column a worker.

    Args:
        workers: of each, its parts and ``step``, all of it.
    """
    columns = [{**w, REST: w["step"] - sum(w[part] for part in PARTS)} for w in workers]
    lines = [
        "| ms a step | " + " | ".join(f"worker {rank}" for rank in range(len(workers))) + " |",
        "| --- |" + " ---: |" * len(workers),
    ]
    for part in (*PARTS, REST, "step"):
        cells = [f"{c[part]:.2f} ({c[part] / c['step']:.1%})" for c in columns]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
