"""What every cluster file of this repository must be for Ray."""

from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import check_legacy_fields, prepare_config, validate_config

ROOT = Path(__file__).parent.parent


def check_accepted(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes it: a head that is always there, and workers from none to as many as may be."""
    monkeypatch.chdir(ROOT)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    check_legacy_fields(prepared)
    head, workers = (prepared["available_node_types"][name] for name in ("head", "gpu_spot"))
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert (workers["min_workers"], workers["max_workers"]) == (0, prepared["max_workers"])
    # Ray's own setup commands fetch a nightly build: none of them may be left.
    assert not [c for c in prepared["head_setup_commands"] if "wheel" in c or "stat " in c]
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--object-store-memory=2000000000" in cluster[start][-1]
    for mounted in cluster["file_mounts"].values():
        assert mounted.startswith("~") or (ROOT / mounted).is_file()
