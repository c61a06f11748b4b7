"""A run that is disturbed by a random schedule of faults, against the same run left alone.

    python -m benchmarks.chaos [--events 20] [--seed 1] [--nodes 3] [--output docs/chaos]

Needs root (each node is a host of its own, in a network namespace) and the extras test and bench.
Prints what each event cost, checks that the two runs are the same bit for bit, and writes
OUTPUT.png and OUTPUT.md.  Exit status 1 if anything differs.
"""

import argparse
import os
import statistics
import sys
import tempfile
import uuid
from pathlib import Path

# Before Ray is imported, which reads them once.
os.environ.update(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)
os.environ.pop("RAY_ADDRESS", None)
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import matplotlib
from chaos import checks
from chaos.cluster import Cluster
from chaos.faults import EVERYWHERE, FAULTS
from chaos.runner import Disturber, Outcome
from chaos.schedule import schedule
from chaos.trial import Trial

from raygpt.device import cpu_kind
from raygpt.train.accounts import Accounts

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

TOKENS = 4096
APART = 60
"""Steps between two events, at least."""
GOALS = {"rank 0": 20, "worker": 20, "node": 30, "drain": 20, "add": 20}
"""Seconds; "add" is a resize, whose pause counts, since a machine takes its time to start."""


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


def draw(quiet: Trial, disturbed: Trial, outcomes: list[Outcome], path: Path) -> None:
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
    top.set_title(f"{len(outcomes)} faults, one model: the two curves are equal bit for bit")
    top.legend(loc="lower left", frameon=False)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/chaos"))
    arguments = parser.parse_args()
    steps = 2 * APART * (arguments.events + 1)
    with tempfile.TemporaryDirectory() as name, Cluster(arguments.nodes) as cluster:
        folder = Path(name)
        Trial.prepare(folder, TOKENS)
        kinds = tuple(FAULTS) if cluster.can_be_cut else EVERYWHERE
        events = schedule(arguments.seed, arguments.events, kinds, steps, APART)
        disturbed, quiet = Trial(folder, "disturbed", steps), Trial(folder, "quiet", steps)
        outcomes = Disturber(cluster, disturbed, size=arguments.nodes - 1).run(events)
        Disturber(cluster, quiet, size=1).run([])
        status, proof = checks.audit(disturbed)
        wrong = checks.differences(checks.result(quiet), checks.result(disturbed))
        opened = checks.open_all(disturbed)
        redone = checks.redone(disturbed, outcomes)
        goodput = {t.name: Accounts(t.rows()).goodput for t in (quiet, disturbed)}
        draw(quiet, disturbed, outcomes, arguments.output.with_suffix(".png"))
    command = f"python -m benchmarks.chaos --events {arguments.events} --seed {arguments.seed}"
    report = [
        f"`{command}` on {os.cpu_count()} cores ({cpu_kind()}), {arguments.nodes} nodes: "
        f"{steps:,} steps, {len(outcomes)} events; weights "
        f"{'equal bit for bit' if not wrong else 'DIFFER'}; {len(opened)} checkpoints verified.",
        "",
        *costs(outcomes, redone),
        "",
        f"Goodput, the share of wall time in steps that count: {goodput['disturbed']:.0%}; left "
        f"alone {goodput['quiet']:.0%}.",
    ]
    print("\n".join([*report, *wrong, proof]))
    arguments.output.with_suffix(".md").write_text("\n".join(report) + "\n")
    if wrong or status:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
