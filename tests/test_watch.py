"""What a cluster shows of a run while it trains: Ray's dashboard, Prometheus, Grafana."""

import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from head import ROOT, Head
from troubled import Reference, Run, finish, wait_for

from raygpt.train.gauges import NAMES

DEADLINE_SECONDS = 90.0
KEPT_SECONDS = 2.0
"""So long does Ray keep a value, at the interval of this head; a validation comes less often."""
CACHES = Path(os.environ["XDG_CACHE_HOME"]) / "raygpt" / "compiled"
_SERIES = re.compile(r"^(ray_raygpt_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def fetch(url: str) -> str:
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    # The dashboard imports Ray Train when it is asked for its page for the first time.
    with urllib.request.urlopen(urllib.request.Request(url, headers=token), timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def series(head: Head) -> dict[str, dict[str, float]]:
    """What Prometheus would collect of raygpt from all nodes: name, rank, value."""
    (group,) = json.loads((head.folder / "0" / "prom_metrics_service_discovery.json").read_text())
    found: dict[str, dict[str, float]] = {}
    for target in group["targets"]:
        for name, labels, value in _SERIES.findall(fetch(f"http://{target}/metrics")):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if tags["run"] == "watched":
                found.setdefault(name, {})[tags["rank"]] = float(value)
    return found


def wait(head: Head, condition: Callable[[dict[str, dict[str, float]]], bool]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found = series(head)
        if condition(found):
            return found
        assert time.monotonic() < deadline, f"still waiting, with {found}"
        time.sleep(0.5)


def test_a_run_can_be_watched(head: Head, reference: Reference) -> None:
    """And what it compiles is kept with it: a machine that has nothing yet compiles nothing."""
    run = reference.run(reference.storage, "watched", head)
    settings = (
        *("--train.steps", "50000", "--train.eval_every", "100", "--model.dropout", "0"),
        *("--train.straggler_factor", "0.01", "--train.profile", "4:6"),
        # One shape of tokens, since each is compiled for itself.
        *("--train.compile", "True", "--batch.ramp_start_tokens", "0", "--batch.ramp_tokens", "0"),
        *("--batch.micro", "4"),
    )
    process = run.start(*settings)
    shown = {f"ray_{name}" for name in NAMES}
    try:
        wait_for(process, lambda: bool(run.rows()), 3 * DEADLINE_SECONDS)  # it compiles
        (template,) = {worker.parent() for worker in head.nodes[0].workers()}
        assert template is not None and "raygpt.train.template" in template.cmdline(), "no copies"
        found = wait(head, lambda series: set(series) >= shown)
        time.sleep(2 * KEPT_SECONDS)
        assert set(series(head)) >= shown, "also what changes less often than Ray forgets it"
        page = json.loads(fetch(f"{head.dashboard}/api/train/v2/runs/v1"))
        process.send_signal(signal.SIGINT)
        finish(process, status=130)
    finally:
        process.kill()
    assert set(found["ray_raygpt_step_seconds"]) == {"0", "1"}, "every worker"
    assert found["ray_raygpt_world_size"]["0"] == 2 and found["ray_raygpt_restarts"]["0"] == 0
    steps = {row["step"]: row for row in run.rows()}
    at = int(found["ray_raygpt_step"]["0"])  # the others may be those of a step beside it
    for name, column in (("loss", "loss"), ("learning_rate", "lr"), ("tokens", "tokens")):
        near = [steps[step][column] for step in range(at - 2, at + 3)]
        assert any(found[f"ray_raygpt_{name}"]["0"] == pytest.approx(value) for value in near)
    assert 0 < found["ray_raygpt_goodput"]["0"] <= 1 and found["ray_raygpt_mfu"]["0"] > 0
    (start,), slow = run.events("start"), run.events("straggler")
    assert start["text"].endswith(", sums by shared memory"), "they are on one machine"
    address = start["machines"][0]["address"]  # at such a factor, each is slow beside the other
    assert [event["text"].split(" takes ")[0] for event in slow] == [
        f"worker {rank} on {address}" for rank in (0, 1)
    ]
    table = (Path(run.folder.path) / "profile" / "steps_4_to_5.md").read_text().splitlines()
    assert table[0] == "| ms a step | worker 0 | worker 1 |"
    assert all(float(line.split()[3]) > 0 for line in table[3:]), "all parts after data"
    compiles_nothing_elsewhere(run, settings)
    (state,) = (r for r in page["train_runs"] if r["name"] == "watched")
    assert state["status"] == "RUNNING"


def compiles_nothing_elsewhere(run: Run, settings: tuple[str, ...]) -> None:
    """The run goes on where nothing is left of what this machine has compiled."""
    shutil.rmtree(CACHES)
    began, steps = time.time(), len(run.rows())
    process = run.start(*settings)
    try:
        wait_for(process, lambda: len(run.rows()) > steps + 1, DEADLINE_SECONDS)
        process.send_signal(signal.SIGINT)
        finish(process, status=130)
    finally:
        process.kill()
    libraries = list(CACHES.rglob("*.so"))
    assert libraries, "nothing was kept with the run"
    assert all(library.stat().st_mtime < began for library in libraries), "compiled again"


def test_grafana_asks_for_series_that_exist() -> None:
    board: dict[str, Any] = json.loads((ROOT / "docs" / "grafana.json").read_text())
    asked: set[str] = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"\bray_(raygpt_\w+)", target["expr"]))
            assert target["expr"].count("(") == target["expr"].count(")")
            assert 'run=~"$run"' in target["expr"]
    assert asked == set(NAMES)
    places = [tuple(panel["gridPos"][side] for side in "xywh") for panel in board["panels"]]
    cells = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells)), "panels lie on each other"
    (variable,) = (v for v in board["templating"]["list"] if v["name"] == "run")
    assert variable["query"]["query"] == "label_values(ray_raygpt_step, run)"
    assert not re.search(r"https?://", json.dumps(board))
