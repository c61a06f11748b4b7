"""What is known of the machines that a cluster may have; the rest is tried by test_autoscaling."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raygpt.config import ScaleConfig
from raygpt.errors import UserError
from raygpt.train import cluster, growth

HEAD = {"resources": {"CPU": 0}, "max_workers": 0}


def largest(
    monkeypatch: pytest.MonkeyPatch, folder: Path, most: int = 4, **types: Any
) -> list[growth.Shape] | None:
    file = folder / "cluster.yaml"
    config = {"max_workers": most, "head_node_type": "head", "available_node_types": types}
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(growth, "_autoscaling_file", lambda: file)
    return growth.largest_cluster()


def test_each_machine_that_may_come_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 2}
    many = {"resources": {"CPU": 2}, "max_workers": 9}
    found = largest(monkeypatch, tmp_path, head=HEAD, worker=worker, many=many)
    expected = [{"CPU": 0}, *[{"CPU": 4, "GPU": 1}] * 2, *[{"CPU": 2}] * 4]
    assert sorted(found or [], key=str) == sorted(expected, key=str)


def test_machines_that_say_nothing_are_not_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = {"resources": {}, "max_workers": 2}
    assert largest(monkeypatch, tmp_path, head=HEAD, worker=worker) is None


@pytest.mark.parametrize(("kind", "grows"), [("node_1f0", False), ("worker", True)])
def test_a_head_that_has_just_started_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, kind: str, grows: bool
) -> None:
    status = json.dumps({"autoscaler_report": {"active_nodes": {kind: 1}}}).encode()
    answers = iter([None, b"", status])
    monkeypatch.setattr(growth, "is_autoscaler_v2", lambda **_: False)
    monkeypatch.setattr(growth, "_autoscaling_file", lambda: None)
    monkeypatch.setattr(growth, "_internal_kv_get", lambda _: next(answers))
    assert growth.can_grow() is grows


def test_a_cluster_without_a_monitor_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "STATUS_SECONDS", 0.2)
    monkeypatch.setattr(growth, "is_autoscaler_v2", lambda **_: False)
    monkeypatch.setattr(growth, "_autoscaling_file", lambda: None)
    monkeypatch.setattr(growth, "_internal_kv_get", lambda _: None)
    assert not growth.can_grow()


@pytest.mark.parametrize(
    ("grows", "shapes", "workers", "gpus", "expected"),
    [
        (False, None, "1", None, 0),
        (False, None, "2", None, "room for 1 workers of 1 CPUs and 0 GPUs (its nodes have 1 CPUs"),
        (False, None, "1", 1, "cpus_per_worker, set scale.gpus_per_worker to 0, or add nodes"),
        (True, None, "8", 1, 1),  # whoever knows more may come
        (True, None, "1", None, "scale.gpus_per_worker must be given"),
        (True, [{"CPU": 4, "GPU": 1}] * 2, "2", None, 1),
        (True, [{"CPU": 4, "GPU": 1}] * 2, "3", None, "(it can grow to nodes with 4 CPUs and 1"),
        (True, [{"CPU": 4, "GPU": 1}] * 2, "2:8", None, 1),
    ],
)
def test_a_run_fits_what_the_cluster_can_become(
    monkeypatch: pytest.MonkeyPatch,
    grows: bool,
    shapes: list[growth.Shape] | None,
    workers: str,
    gpus: int | None,
    expected: int | str,
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr(growth, "can_grow", lambda: grows)
    monkeypatch.setattr(growth, "largest_cluster", lambda: shapes)
    scale = ScaleConfig(workers, gpus)
    if isinstance(expected, int):
        assert cluster.fit_scale(scale).gpus_per_worker == expected
        return
    with pytest.raises(UserError) as error:
        cluster.fit_scale(scale)
    assert expected in str(error.value)
