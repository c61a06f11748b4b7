"""The cluster file: accepted by Ray, closed to the world, and in step with the package."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusters import check_accepted
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def constraint(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found is not None
    return found[1]


def test_ray_accepts_it(cluster: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_accepted(cluster, monkeypatch)


def test_validation_would_notice(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["head"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(cluster))


def test_head_stays_and_workers_are_spot(cluster: dict[str, Any]) -> None:
    head, workers = (cluster["available_node_types"][name] for name in ("head", "gpu_spot"))
    assert cluster["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_no_port_is_open(cluster: dict[str, Any]) -> None:
    # Ray makes a group of its own, open to the world on port 22, for nodes that name none.
    groups = [
        n["node_config"]["SecurityGroupIds"] for n in cluster["available_node_types"].values()
    ]
    assert groups[0] == groups[1] and len(groups[0]) == 1
    assert "security_group" not in cluster["provider"]
    text = (ROOT / "cluster.yaml").read_text()
    assert "0.0.0.0" not in text and "--port 22 --cidr YOUR.ADDRESS/32" in text
    (start,) = (c for c in cluster["head_start_ray_commands"] if "ray start" in c)
    assert "--dashboard-host=127.0.0.1" in start and "--ray-client-server-port" not in start
    assert not any("-p " in o or "--publish" in o for o in cluster["docker"]["run_options"])


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = (o.partition("RAY_AUTH_TOKEN_PATH=")[2] for o in options if "_TOKEN_PATH" in o)
    assert cluster["file_mounts"][path] == "~/.ray/auth_token"
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        (start,) = (c for c in commands if "ray start" in c)
        assert start.startswith("RAY_AUTH_MODE=token ray start ")
    assert "RAY_AUTH_TOKEN=" not in (ROOT / "cluster.yaml").read_text()


def test_no_keys_are_stored(cluster: dict[str, Any]) -> None:
    for node in cluster["available_node_types"].values():
        assert "Name" in node["node_config"]["IamInstanceProfile"]
    text = (ROOT / "cluster.yaml").read_text().lower()
    assert "aws_secret" not in text and "aws_access" not in text


def test_versions_are_those_that_are_tested(cluster: dict[str, Any]) -> None:
    images = {cluster["docker"]["head_image"], cluster["docker"]["worker_image"]}
    ray = constraint("ray")
    assert images == {f"rayproject/ray:{ray}-py311-{kind}" for kind in ("cpu", "gpu")}
    for mounted in cluster["file_mounts"].values():
        assert mounted.startswith("~") or (ROOT / mounted).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=!~;]", name)[0].strip() for name in project["dependencies"]}
    (install,) = cluster["setup_commands"]
    assert set(install.replace("'", "").split("constraints.txt ")[1].split()) == needed
