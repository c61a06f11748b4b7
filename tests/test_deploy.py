"""The files in deploy/: accepted by Ray and by what reads them, and in step with cluster.yaml.

Ray validates the cluster file for Google Cloud without Google's client libraries, which are not
among the tests' packages, so Ray's own step before a start (``bootstrap_gcp``: project, accounts,
key, subnet) does not run.  What the machines of that file ask Compute Engine for is held against a
part of its API's description, in a JSON file beside this one which says where it is from.  Nothing
here talks to Google Cloud, so rights, image names and commands in comments are not checked.
"""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import check_legacy_fields, prepare_config, validate_config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
HEALTH = re.compile(r"RAY_health_check_\w+")


def schema(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / name).read_text())
    jsonschema.Draft202012Validator.check_schema(loaded)
    return loaded


def check(document: dict[str, Any], name: str) -> None:
    jsonschema.validate(document, schema(name), jsonschema.Draft202012Validator)


def needed() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[<>=!~;]", name)[0].strip() for name in project["dependencies"]}


def installed(command: str) -> set[str]:
    """What a pip command with constraints installs."""
    words = shlex.split(command.replace("\\\n", " "))
    (constraints,) = (i for i, word in enumerate(words) if word.endswith("constraints.txt"))
    assert words[constraints - 1] == "-c"
    return set(words[constraints + 1 :])


@pytest.fixture
def aws() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


@pytest.fixture
def gcp() -> dict[str, Any]:
    # Aliases are resolved into copies, so that a test can break one machine and leave the other.
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "gcp.yaml").read_text())
    return json.loads(json.dumps(loaded))


def node_configs(gcp: dict[str, Any]) -> list[dict[str, Any]]:
    return [gcp["available_node_types"][name]["node_config"] for name in ("head", "gpu_spot")]


# Google Cloud


def test_ray_accepts_the_cluster(gcp: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    prepared = prepare_config(gcp)
    validate_config(prepared)
    check_legacy_fields(prepared)
    head, workers = (prepared["available_node_types"][name] for name in ("head", "gpu_spot"))
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert (workers["min_workers"], workers["max_workers"]) == (0, prepared["max_workers"])
    # Ray's own setup commands fetch a nightly build: none of them may be left.
    assert not [c for c in prepared["head_setup_commands"] if "wheel" in c or "stat " in c]
    for mounted in gcp["file_mounts"].values():
        assert mounted.startswith("~") or (ROOT / mounted).is_file()


def test_ray_would_refuse_the_cluster(gcp: dict[str, Any]) -> None:
    gcp["available_node_types"]["gpu_spot"]["max_worker"] = 1
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(gcp))


def test_compute_engine_knows_the_fields(gcp: dict[str, Any]) -> None:
    for node_config in node_configs(gcp):
        check(node_config, "compute_schema.json")


@pytest.mark.parametrize(
    "broken",
    [
        {"scheduling": [{"provisioningModel": "SPOT"}]},  # a list, as in Ray's own examples
        {"scheduling": {"provisioningModel": "spot"}},
        {"scheduling": {"onHostMaintenence": "TERMINATE"}},
        {"tags": ["raygpt"]},
        {"disks": [{"initializeParams": {"diskSizeGb": 1.5}}]},
    ],
)
def test_compute_engine_would_refuse(gcp: dict[str, Any], broken: dict[str, Any]) -> None:
    _, worker = node_configs(gcp)
    with pytest.raises(jsonschema.ValidationError):
        check({**worker, **broken}, "compute_schema.json")


def test_head_stays_and_workers_are_spot(gcp: dict[str, Any]) -> None:
    types = gcp["available_node_types"]
    assert gcp["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    # Not looked up on Google Cloud, and without them no worker would ever be started.
    assert types["gpu_spot"]["resources"] == {"CPU": 4, "GPU": 1}
    head, worker = node_configs(gcp)
    assert "scheduling" not in head
    assert worker["scheduling"] == {
        "provisioningModel": "SPOT",
        "onHostMaintenance": "TERMINATE",
        "automaticRestart": False,
        "instanceTerminationAction": "DELETE",
    }
    zone, region = gcp["provider"]["availability_zone"], gcp["provider"]["region"]
    for node_config in (head, worker):
        (disk,), (network,) = node_config["disks"], node_config["networkInterfaces"]
        assert disk["boot"] and disk["autoDelete"]
        assert disk["initializeParams"]["diskType"].startswith(f"zones/{zone}/")
        assert network["subnetwork"].startswith(f"regions/{region}/")


def test_no_port_of_the_cluster_is_open(gcp: dict[str, Any]) -> None:
    text = (DEPLOY / "gcp.yaml").read_text()
    assert "0.0.0.0" not in text
    # Ray takes any subnet, and with it that network's rules, for machines that name none.
    for node_config in node_configs(gcp):
        (network,) = node_config["networkInterfaces"]
        assert network["subnetwork"].endswith("/subnetworks/raygpt")
        assert node_config["tags"] == {"items": ["raygpt"]}
    rules = re.findall(r"firewall-rules create .*?(?=#      gcloud|#\n)", text, re.S)
    sources = [re.findall(r"--source-(\S+ \S+)", rule) for rule in rules]
    assert sources == [["ranges YOUR.ADDRESS/32"], ["tags raygpt"]]
    assert all("--network raygpt" in r and "--target-tags raygpt" in r for r in rules)
    (start,) = (c for c in gcp["head_start_ray_commands"] if "ray start" in c)
    assert "--dashboard-host=127.0.0.1" in start and "--ray-client-server-port" not in start


def test_no_keys_are_stored(gcp: dict[str, Any]) -> None:
    accounts = [node_config["serviceAccounts"] for node_config in node_configs(gcp)]
    project = gcp["provider"]["project_id"]
    assert [account["email"] for (account,) in accounts] == [
        f"raygpt-{who}@{project}.iam.gserviceaccount.com" for who in ("head", "worker")
    ]
    assert "gcp_credentials" not in gcp["provider"]
    for file in DEPLOY.iterdir():
        text = file.read_text().lower()
        assert not re.search(r"credentials\.json|aws_secret|aws_access|ray_auth_token=", text)


def test_the_cluster_is_that_of_cluster_yaml(gcp: dict[str, Any], aws: dict[str, Any]) -> None:
    differing = {"provider", "available_node_types", "head_setup_commands"}
    assert gcp.keys() == aws.keys()
    for key in gcp.keys() - differing:
        assert gcp[key] == aws[key], key
    assert any(HEALTH.search(option) for option in gcp["docker"]["run_options"])
    (install,) = gcp["setup_commands"]
    assert installed(install) == needed()
    (client,) = gcp["head_setup_commands"]
    assert installed(client) == {"google-api-python-client"}
