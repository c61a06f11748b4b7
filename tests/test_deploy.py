"""The files in deploy/: accepted by Ray and by what reads them, and in step with cluster.yaml.

Ray validates the cluster file for Google Cloud without Google's client libraries, which are not
among the tests' packages, so Ray's own step before a start (``bootstrap_gcp``: project, accounts,
key, subnet) does not run.  What the machines of that file ask Compute Engine for is held against a
part of its API's description, the RayJob against a part of KubeRay's definition; both parts are in
JSON files beside this one and say where they come from.  The RayJob is also read by the code with
which Ray's autoscaler reads it.  Nothing here talks to Google Cloud or Kubernetes, so rights, image
names and commands in comments are not checked, and no image is built.
"""

import copy
import json
import re
import shlex
import shutil
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from clusters import check_accepted
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from raygpt.settings import load_settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
OF_NODES = re.compile(r"RAY_(health_check|idle_worker|worker)_\w+")


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


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text()))


@pytest.fixture
def rayjob(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (document for document in documents if document["kind"] == "RayJob")
    return json.loads(json.dumps(found))


def node_configs(gcp: dict[str, Any]) -> list[dict[str, Any]]:
    return [gcp["available_node_types"][name]["node_config"] for name in ("head", "gpu_spot")]


def pods(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs of head and workers."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


# Google Cloud


def test_ray_accepts_the_cluster(gcp: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_accepted(gcp, monkeypatch)


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
    assert any(OF_NODES.search(option) for option in gcp["docker"]["run_options"])
    (install,) = gcp["setup_commands"]
    assert installed(install) == needed()
    (client,) = gcp["head_setup_commands"]
    assert installed(client) == {"google-api-python-client"}


# Kubernetes


def test_kuberay_knows_the_fields(rayjob: dict[str, Any]) -> None:
    check(rayjob, "kuberay_schema.json")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("backofLimit", 1),
        ("backoffLimit", "3"),
        ("rayClusterSpec/authOptions/mode", "tokens"),
        ("rayClusterSpec/autoscalerOptions/upscalingMode", "Fast"),
        ("rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("rayClusterSpec/headGroupSpec/template/spec/hostNetwork", True),
        ("rayClusterSpec/headGroupSpec/template/spec/containers/0/env/0/value", 1000),
        ("rayClusterSpec/headGroupSpec/template/spec/containers/0/resources/limits/memory", "6 GB"),
        ("rayClusterSpec/workerGroupSpecs/0/maxReplicas", "8"),
        ("rayClusterSpec/workerGroupSpecs/0/template/spec/nodeSelector/spot", True),
    ],
)
def test_kuberay_would_refuse(rayjob: dict[str, Any], where: str, value: object) -> None:
    place: Any = rayjob["spec"]
    *folders, last = (int(key) if key.isdigit() else key for key in where.split("/"))
    for key in folders:
        place = place[key]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(rayjob, "kuberay_schema.json")


@pytest.mark.parametrize("field", ["groupName", "minReplicas", "maxReplicas", "template"])
def test_kuberay_would_miss(rayjob: dict[str, Any], field: str) -> None:
    del rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0][field]
    with pytest.raises(jsonschema.ValidationError, match=field):
        check(rayjob, "kuberay_schema.json")


def test_rays_autoscaler_reads_it(rayjob: dict[str, Any], aws: dict[str, Any]) -> None:
    spec = rayjob["spec"]["rayClusterSpec"]
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "raygpt", "namespace": "default"}, "spec": copy.deepcopy(spec)}
    )
    validate_config(config)
    assert config["idle_timeout_minutes"] == aws["idle_timeout_minutes"]
    assert config["max_workers"] == aws["max_workers"]
    types = config["available_node_types"]
    head, workers = types[config["head_node_type"]], types["gpu-spot"]
    assert head["resources"]["CPU"] == 0 and head["max_workers"] == 0
    assert (workers["min_workers"], workers["max_workers"]) == (0, 8)
    assert workers["resources"]["GPU"] == 1 and workers["resources"]["CPU"] >= 1


def test_the_run_that_is_submitted(rayjob: dict[str, Any]) -> None:
    python, program, *arguments = shlex.split(rayjob["spec"]["entrypoint"])
    folder = re.findall(r"^WORKDIR (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert (python, program) == ("python", f"{folder[0]}/jobs/train.py")
    config, dry_run = load_settings(arguments)
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert not dry_run
    assert (config.scale.min_workers, config.scale.max_workers) == (1, group["maxReplicas"])
    assert config.scale.gpus_per_worker == 1
    assert config.run.storage.startswith("gs://")
    assert rayjob["spec"]["shutdownAfterJobFinishes"]
    # KubeRay makes names of services and labels of it (DNS-1035, and room for a suffix).
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", rayjob["metadata"]["name"])
    assert len(rayjob["metadata"]["name"]) <= 40


def test_every_pod_asks_for_the_token_and_none_is_open(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    # KubeRay gives it to head, workers and submitter, from Ray 2.52 on, if it is told the version.
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    text = (DEPLOY / "rayjob.yaml").read_text()
    assert not re.search(r"LoadBalancer|NodePort|Ingress|hostPort|hostNetwork", text, re.I)


def test_pods_are_not_root(documents: list[dict[str, Any]], rayjob: dict[str, Any]) -> None:
    (*_, user) = re.findall(r"^USER (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    head, workers = pods(rayjob)
    for pod in (head, workers):
        security = pod["securityContext"]
        assert security["runAsNonRoot"]
        assert f"{security['runAsUser']}:{security['runAsGroup']}" == user == "1000:100"
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        # Memory that is not asked for in full is what a pod is killed for.
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    assert accounts == {head["serviceAccountName"], workers["serviceAccountName"]}
    assert len(accounts) == 2  # the operator gives the head's account rights that no worker needs
    assert workers["automountServiceAccountToken"] is False


def test_workers_are_spot_and_the_head_is_not(rayjob: dict[str, Any]) -> None:
    head, workers = pods(rayjob)
    assert "nodeSelector" not in head and "tolerations" not in head
    spot = "cloud.google.com/gke-spot"
    assert workers["nodeSelector"][spot] == "true"
    assert {t["key"] for t in workers["tolerations"]} == {spot, "nvidia.com/gpu"}
    # The taint that keeps the head away is set where the nodes are made.
    assert f"--node-taints {spot}=true:NoSchedule" in (DEPLOY / "rayjob.yaml").read_text()


def test_versions_are_those_of_cluster_yaml(rayjob: dict[str, Any], aws: dict[str, Any]) -> None:
    (base,) = re.findall(r"^FROM (\S+)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert base == aws["docker"]["worker_image"]
    assert f":{rayjob['spec']['rayClusterSpec']['rayVersion']}-" in base
    (image,) = {container["image"] for pod in pods(rayjob) for container in pod["containers"]}
    assert image in (DEPLOY / "Dockerfile").read_text()  # the name that it says to build under
    options = [o.removeprefix("--env ").split("=") for o in aws["docker"]["run_options"]]
    of_nodes = dict(option for option in options if OF_NODES.fullmatch(option[0]))
    assert len(of_nodes) == 5 and of_nodes["RAY_worker_niceness"] == "0"
    for pod in pods(rayjob):
        (container,) = pod["containers"]
        assert {e["name"]: e["value"] for e in container["env"]} == of_nodes


def test_the_image_has_what_raygpt_needs() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    packages, package = re.findall(r"^RUN pip install ((?:.*\\\n)*.*)$", text, re.M)
    assert installed(packages) == needed()
    assert package.split()[-3:] == ["--no-deps", "-e", "."]
    copied = {
        name
        for line in re.findall(r"^COPY --chown=1000:100 (.*) \S+$", text, re.M)
        for name in line.split()
    }
    let_in = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert let_in[0] == "*"
    assert {line.removeprefix("!") for line in let_in if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_what_a_job_is_sent(tmp_path: Path) -> None:
    """Code and settings; not what lies beside them in a folder that was worked in."""
    kept = ["jobs/train.py", "raygpt/assets/tinyshakespeare.txt", "mine.yaml"]
    left = [".git/HEAD", ".venv/bin/python", "corpora/mine/manifest.json", "output.txt"]
    left += ["runs/mine/config.json", "exported/mine/config.json", "raygpt/__pycache__/x.pyc"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    package = tmp_path.parent / "sent.zip"
    create_package(str(tmp_path), package, include_gitignore=True)
    with zipfile.ZipFile(package) as sent:
        assert sorted(sent.namelist()) == sorted([*kept, ".gitignore", ".rayignore"])
