"""Seconds of a job on a cluster: to its first step, and from a lost worker to the next step.

    python -m benchmarks.copies [--short] [--rounds 5]

A cluster of one machine with two CPUs, as ``ray start`` makes it, and two workers.  The other side
is raygpt without copies of a template, with processes as Ray starts them, which a job with a Python
of its own has.  Needs the extra test.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

# Before Ray is imported, which reads them once.
os.environ.update(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0")
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
os.environ.pop("RAY_ADDRESS", None)
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from head import Head
from troubled import finish, wait_for

from benchmarks.turns import Row, in_turns, print_rows, ratio
from raygpt.runs.files import EVENTS, METRICS, read_json_lines
from raygpt.storage import Folder

_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # as ``ray job submit --runtime-env-json`` hands it on
OWN_PYTHON = json.dumps({"runtime_env": {"py_executable": "python"}})
TRAINED = 20
"""Steps before a worker is lost."""


def lose_a_worker(head: Head, storage: Path, copies: bool) -> tuple[float, float, float]:
    """Seconds to the first step, from the loss to the next, and CPU seconds of this machine."""
    name = uuid.uuid4().hex
    run = Folder.from_path(str(storage)).child(name)
    if not copies:
        os.environ[_CONFIG] = OWN_PYTHON
    began, used = time.time(), _cpu_seconds()
    try:
        process = head.start(
            *("python", "jobs/train.py", "shakespeare", f"--run.storage={storage}"),
            *(f"--run.name={name}", "--scale.workers=2", "--scale.gpus_per_worker=0"),
            *("--train.steps=50000", "--train.eval_tokens=0", "--train.sample_prompt="),
        )
    finally:
        os.environ.pop(_CONFIG, None)

    def times() -> list[float]:
        return [row["time"] for row in read_json_lines(run, METRICS)]

    wait_for(process, lambda: len(times()) > TRAINED)
    first = times()[0]
    head.nodes[0].workers()[-1].kill()
    lost = time.time()

    def starts() -> list[float]:
        events = read_json_lines(run, EVENTS)
        return [event["time"] for event in events if event["kind"] == "start"]

    wait_for(process, lambda: len(starts()) > 1 and times()[-1] > starts()[1])
    again = next(moment for moment in times() if moment > starts()[1])
    process.send_signal(signal.SIGINT)
    finish(process, status=130)
    return first - began, again - lost, _cpu_seconds() - used


def _cpu_seconds() -> float:
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _by_figure(runs: list[tuple[float, float, float]]) -> list[list[float]]:
    return [[run[i] for run in runs] for i in range(3)]


def rows(asked: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, Head(cpus=2) as head:
        side = partial(lose_a_worker, head, Path(folder))
        sides: list[Callable[[], tuple[float, float, float]]] = [
            partial(side, copies) for copies in (True, False)
        ]
        ours, plain = in_turns(sides, asked)
    what = "command to first step, cluster", "a lost worker to the next step", "CPU time of both"
    for name, mine, theirs in zip(what, *map(_by_figure, (ours, plain)), strict=True):
        yield Row(
            name,
            f"{statistics.median(mine):.1f} s",
            "processes as Ray starts them",
            f"{statistics.median(theirs):.1f} s",
            ratio(theirs, mine),
        )


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=5, short=2)
