"""A run that is disturbed by a random schedule of faults, against the same run left alone.

    python -m benchmarks.chaos [--events 20] [--seed 1] [--nodes 3] [--apart 60] [--plain]
        [--output docs/chaos]

Needs root (each node is a host of its own, in a network namespace) and the extras test and bench.
Prints what each event cost, checks that the two runs are the same bit for bit, and writes
OUTPUT.png and OUTPUT.md.  Exit status 1 if anything differs.  With --plain the same schedule then
strikes the program of plain_ray.py, on a cluster with Ray's own settings.
"""

import argparse
import os
import statistics
import sys
import tempfile
import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before Ray is imported, which reads them once.
os.environ.update(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # notices come from the schedule
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
os.environ.pop("RAY_ADDRESS", None)
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import matplotlib
from chaos import checks
from chaos.cluster import Cluster
from chaos.faults import EVERYWHERE, FAULTS
from chaos.runner import Disturber, Outcome
from chaos.schedule import Event, schedule
from chaos.trial import Trial

from raygpt.device import cpu_kind

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

TOKENS = 4096
SEGMENT = 250
"""Steps of a block: what a worker reads by itself lasts until Ray Data has started."""
TAIL = 600
"""Steps in which the run becomes whole again after the last event, before it ends."""
PLAIN_PATIENCE = 900.0
"""Seconds in which it must be back after an event; raygpt's is a fifth of it."""
GOALS = {"rank 0": 20, "worker": 20, "node": 30, "add": 20}
"""Seconds; "add" is a resize, whose pause counts, since a machine takes its time to start."""


@dataclass(frozen=True)
class PlainTrial(Trial):
    """The plain program with the same settings, and no end.

    It grows within a minute, not within seconds, and would come to any end before it is whole.
    """

    @property
    def program(self) -> list[str]:
        return ["python", "benchmarks/plain_ray.py", str(self.folder / "run.yaml"), self.name]


def goodput(ledger: list[dict[str, Any]]) -> float:
    """Share of wall time, from the first step's end to the last's, in steps that count."""
    took = {
        line["step"]: line["time"] - before["time"]  # of several times, the last one counts
        for before, line in pairwise(ledger)
        if line["attempt"] == before["attempt"]
    }
    return sum(took.values()) / (ledger[-1]["time"] - ledger[0]["time"])


def costs(outcomes: list[Outcome], redone: list[int]) -> list[str]:
    """A Markdown table: each kind of event, its median cost and its goal."""
    lines = [
        "| event | times | seconds to the next step | pause | goal | steps computed again |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in FAULTS:
        mine = [(o, r) for o, r in zip(outcomes, redone, strict=True) if o.kind == kind]
        if not mine:
            continue
        seconds = statistics.median(o.seconds for o, _ in mine)
        pause = statistics.median(o.pause for o, _ in mine)
        lines.append(
            f"| {kind} | {len(mine)} | {seconds:.1f} | {pause:.1f} | {GOALS.get(kind, '')} | "
            f"{sum(r for _, r in mine)} |"
        )
    return lines


def draw(quiet: Trial, disturbed: Trial, outcomes: list[Outcome], equal: bool, path: Path) -> None:
    """Losses over each other, events, and the number of workers below."""
    figure, (top, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(11, 6), height_ratios=(3, 1), layout="constrained"
    )
    for trial, style in (
        (quiet, {"color": "#f2a65a", "linewidth": 5, "label": "left alone"}),
        (disturbed, {"color": "#1d3557", "linewidth": 1, "label": "disturbed"}),
    ):
        rows = trial.rows()
        top.plot([r["step"] for r in rows], [r["loss"] for r in rows], **style)
    for number, outcome in enumerate(outcomes, 1):
        for axes in (top, below):
            axes.axvline(outcome.step, color="#999999", linewidth=0.7, zorder=0)
        top.annotate(
            f"{outcome.kind}",
            (outcome.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -4 - 11 * (number % 4)),
            textcoords="offset points",
            fontsize=8,
            color="#444444",
            verticalalignment="top",
        )
    rows = disturbed.rows()
    below.step([r["step"] for r in rows], [r["world_size"] for r in rows], color="#1d3557")
    below.set(xlabel="step", ylabel="workers", ylim=(0, None))
    below.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    top.set(ylabel="training loss, nats a byte")
    found = "are equal bit for bit" if equal else "DIFFER"
    top.set_title(f"{len(outcomes)} faults, one model: the two curves {found}")
    top.legend(loc="lower left", frameon=False)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def disturb_plain(folder: Path, events: tuple[Event, ...], nodes: int) -> list[str]:
    """Let the same schedule strike the plain program; a row of the comparison."""
    with Cluster(nodes, environment={}) as cluster:
        trial = PlainTrial(folder, "plain")
        disturber = Disturber(cluster, trial, size=nodes - 1, patience=PLAIN_PATIENCE)
        outcomes = disturber.run(events, endless=True)
    return comparison("plain Ray Train", trial, outcomes)


def comparison(name: str, trial: Trial, outcomes: list[Outcome]) -> list[str]:
    """One row: what all events together cost, until the last is over."""
    ledger = [line for line in trial.ledger() if line["time"] <= outcomes[-1].next_time]
    wall = ledger[-1]["time"] - ledger[0]["time"]
    median = statistics.median(outcome.seconds for outcome in outcomes)
    good, again = goodput(ledger), sum(checks.redone(trial, outcomes))
    lost = wall * (1 - good) / len(outcomes)
    return [f"| {name} | {wall:.0f} | {good:.0%} | {lost:.1f} | {median:.1f} | {again} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--apart", type=int, default=60, help="steps between events, at least")
    parser.add_argument("--plain", action="store_true", help="compare with plain Ray Train")
    parser.add_argument("--output", type=Path, default=Path("docs/chaos"))
    arguments = parser.parse_args()
    for name, least in (("events", 1), ("nodes", 2), ("apart", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: {least} at least")
    if not arguments.output.parent.is_dir():  # it is written at the end, an hour later
        parser.error(f"--output: there is no folder {arguments.output.parent}")
    steps = 2 * arguments.apart * (arguments.events + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Trial.prepare(folder, TOKENS, SEGMENT)
        disturbed, quiet = (Trial(folder, n, steps + TAIL) for n in ("disturbed", "quiet"))
        with Cluster(arguments.nodes) as cluster:
            kinds = tuple(FAULTS) if cluster.can_be_cut else EVERYWHERE
            events = schedule(arguments.seed, arguments.events, kinds, steps, arguments.apart)
            outcomes = Disturber(cluster, disturbed, size=arguments.nodes - 1).run(events)
            Disturber(cluster, quiet, size=1).run([])
        status, proof = checks.audit(disturbed)
        wrong = checks.differences(checks.result(quiet), checks.result(disturbed))
        opened = checks.open_all(disturbed)
        draw(quiet, disturbed, outcomes, not wrong, arguments.output.with_suffix(".png"))
        command = " ".join(["python -m benchmarks.chaos", *sys.argv[1:]])
        report = [
            f"`{command}` on {os.cpu_count()} cores ({cpu_kind()}), {arguments.nodes} nodes: "
            f"{disturbed.steps:,} steps, {len(outcomes)} events; weights "
            f"{'DIFFER' if wrong else 'equal bit for bit'}; {len(opened)} checkpoints verified.",
            "",
            *costs(outcomes, checks.redone(disturbed, outcomes)),
            "",
            "The goal of a new machine is for the pause: it takes its time to start. Goodput is "
            "the share of wall time in steps that count, until the last event is over; left "
            f"alone, raygpt's is {goodput(quiet.ledger()):.0%}.",
            "",
            "| the same faults | wall seconds | goodput | lost an event, s | median recovery, s | "
            "steps computed again |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *comparison("raygpt", disturbed, outcomes),
        ]
        print("\n".join([*report, *wrong, proof]), flush=True)
        if arguments.plain:
            row = disturb_plain(folder, events, arguments.nodes)
            print(*row)
            report += row
    arguments.output.with_suffix(".md").write_text("\n".join(report) + "\n")
    if wrong or status:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
