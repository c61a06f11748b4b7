"""Faults strike one run; the model that comes out is that of a quiet run on one machine, bit for
bit.  This is the short form; ``python -m benchmarks.chaos`` has all faults, at random."""

from pathlib import Path

import pytest

from chaos import checks
from chaos.cluster import Cluster
from chaos.faults import FAULTS
from chaos.network import available
from chaos.runner import Disturber
from chaos.schedule import Event
from chaos.trial import Trial

TOKENS = 1024
NODES = 3
APART = 20
"""Steps between two events, at least."""
ALL_DIE = "head"
"""After this, steps since the last checkpoint are computed again; after others, none."""
ORDER = ("partition", "rank 0", "worker", "node", "stop", "head")
"""So that there are always nodes to lose, none need be replaced, and few processes start."""
ELSEWHERE = {
    "drain": "test_recovery.py",
    "interrupt": "test_recovery.py",
    "add": "test_autoscaling.py",
    "driver": "test_run.py",
}
"""Where the others are tried, each alone."""


@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(1500)  # a busy machine may take long; a recovery has its own limit
def test_a_run_that_meets_faults(tmp_path: Path) -> None:
    """It loses processes, machines and its cluster, and nobody can tell.

    With the modern recipe, since other tests kill runs of GPT-2's.
    """
    assert {*ORDER, *ELSEWHERE} == set(FAULTS), "a kind of fault is not tried"
    Trial.prepare(tmp_path, TOKENS, modern=True)
    with Cluster(NODES) as cluster:
        kinds = [kind for kind in ORDER if kind != "partition" or cluster.can_be_cut]
        if len(kinds) < len(ORDER):
            print(f"no machine is cut off: {available()}")
        events = [Event(APART * (i + 1), kind, 1) for i, kind in enumerate(kinds)]
        disturber = Disturber(cluster, Trial(tmp_path, "disturbed"), size=1)
        outcomes = disturber.run(events, closing=APART)
        disturbed = disturber.trial
    assert cluster.leftovers() == []
    quiet = Trial(tmp_path, "quiet", disturbed.steps)
    quiet.train_here()

    assert [outcome.kind for outcome in outcomes if outcome.scheduled] == kinds
    assert checks.differences(checks.result(quiet), checks.result(disturbed)) == []
    assert len(checks.result(quiet).trained) == disturbed.steps
    assert disturbed.steps in checks.open_all(disturbed)
    status, output = checks.audit(disturbed)
    assert status == 0, output
    for outcome, redone in zip(outcomes, checks.redone(disturbed, outcomes), strict=True):
        assert not redone or outcome.kind == ALL_DIE, f"{outcome.kind} cost {redone} steps"
        print(
            f"{outcome.kind:10s} step {outcome.step:5d}: {outcome.seconds:5.1f} s, "
            f"{redone} steps redone, {outcome.size} -> {outcome.next_size} workers"
        )
