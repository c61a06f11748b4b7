"""Where a step's time goes: a trace of each worker, and a table that adds up."""

import gzip
import json
import re
import time
from pathlib import Path

import pytest
import torch
from helpers import on_workers

from raygpt.config import TrainConfig
from raygpt.errors import UserError
from raygpt.storage import Folder
from raygpt.train.profile import PARTS, Profiler, table

PAUSES = dict(zip(PARTS, (0.03, 0.01, 0.02, 0.005, 0.004), strict=True))
REST = 0.015


def loop(folder: Path) -> list[str]:
    """Six steps of a worker, of which three are profiled; what lies in the folder after each."""
    profiler = Profiler("2:5", torch.device("cpu"), Folder.from_path(str(folder)), 0.0)
    seen = []
    for step in range(6):
        with profiler.step(step):
            for part, pause in PAUSES.items():
                with profiler.part(part):
                    torch.ones(8) @ torch.ones(8)
                    time.sleep(pause)
            time.sleep(REST)
        seen.append(",".join(sorted(path.name for path in folder.glob("profile/*"))))
    return seen


def test_traces_and_a_table_of_the_steps_that_were_named(tmp_path: Path) -> None:
    seen = on_workers(2, loop, tmp_path)[0]
    assert seen[:4] == ["", "", "", ""]
    names = ["steps_2_to_4.md", *(f"steps_2_to_4_rank_{rank}.json.gz" for rank in (0, 1))]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    for name in names[1:]:
        trace = json.loads(gzip.decompress((tmp_path / "profile" / name).read_bytes()))
        found = [e["name"] for e in trace["traceEvents"] if e.get("ph") == "X"]
        assert all(found.count(part) == 3 for part in (*PARTS, "step"))
        assert "aten::dot" in found
    lines = (tmp_path / "profile" / names[0]).read_text().splitlines()
    assert lines[0] == "| ms a step | worker 0 | worker 1 |"
    for column in (0, 1):
        ms = {
            line.split("|")[1].strip(): float(re.findall(r"([\d.]+) \(", line)[column])
            for line in lines[2:]
        }
        step = ms.pop("step")
        assert list(ms) == [*PARTS, "rest"]
        assert sum(ms.values()) == pytest.approx(step, abs=0.1)
        for part, pause in {**PAUSES, "rest": REST}.items():
            assert ms[part] >= 1000 * pause


def test_shares_add_up() -> None:
    parts = dict.fromkeys(PARTS, 10.0)
    shares = re.findall(r"\(([\d.]+)%\)", table([{**parts, "step": 80.0}]))
    assert [float(share) for share in shares] == [12.5] * 5 + [37.5, 100.0]


@pytest.mark.parametrize("steps", ["3", "3:", ":3", "3:3", "4:2", "-1:2", "a:b", "1:2:3"])
def test_steps_that_cannot_be_profiled(steps: str) -> None:
    with pytest.raises(UserError, match=r"train\.profile must be N:M"):
        TrainConfig(profile=steps)


def test_steps_beyond_the_end() -> None:
    TrainConfig(profile="5:10", steps=10)
    with pytest.raises(UserError, match=r"train\.profile 5:11: the run ends at step 10"):
        TrainConfig(profile="5:11", steps=10)
