"""The walk-through's commands, policies and messages are real, as far as no cloud is needed."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from raygpt.cli import option_names, parse
from raygpt.errors import UserError
from raygpt.settings import load_settings
from raygpt.values import setting_names

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "walk-through.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
VARIABLES = {
    "REGION": "eu-north-1",
    "ZONE": "eu-north-1b",
    "AMI": "ami-0123456789abcdef0",
    "SG": "sg-0123456789abcdef0",
    "ACCOUNT": "123456789012",
    "BUCKET": "raygpt-123456789012",
    "EMAIL": "you@example.com",
}


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def jobs() -> list[tuple[str, list[str]]]:
    """Every call of a job: its name and arguments."""
    found = []
    for line in LINES:
        _, python, call = line.partition("python jobs/")
        if python:
            name, *arguments = words(call)
            found.append((name.removesuffix(".py"), arguments))
    return found


def accept(name: str, arguments: list[str]) -> None:
    """Parse a job's arguments as the job does; raises UserError."""
    if name == "train":
        load_settings(arguments)
        return
    spec = importlib.util.spec_from_file_location(f"jobs_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = {word[2:].replace("-", "_") for word in arguments if word.startswith("--")}
    assert given <= set(option_names(module.Arguments))
    parse(module.Arguments, None, arguments)


def documents() -> dict[str, Any]:
    """The JSON files that the commands write, with variables filled in."""
    found = re.findall(r"^cat > (\S+\.json) <<EOF\n(.*?)^EOF$", "".join(BLOCKS), re.M | re.S)
    return {
        name: json.loads(re.sub(r"\$(\w+)", lambda m: VARIABLES[m[1]], body))
        for name, body in found
    }


def test_blocks_are_shell() -> None:
    assert TEXT.count("```") == 2 * len(BLOCKS) > 20
    for block in BLOCKS:
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert not checked.stderr, f"{block}\n{checked.stderr}"


def test_jobs_accept_their_arguments() -> None:
    calls = jobs()
    assert {name for name, _ in calls} == {"prepare", "train", "sample", "export", "audit", "runs"}
    for name, arguments in calls:
        accept(name, arguments)


@pytest.mark.parametrize(
    "command", ["train gpt2 --batch.micros 8", "prepare --inputs a --output b", "audit --run x"]
)
def test_a_wrong_argument_would_be_noticed(command: str) -> None:
    name, *arguments = words(command)
    with pytest.raises((UserError, AssertionError)):
        accept(name, arguments)


def test_a_run_is_resumed_with_its_own_settings() -> None:
    runs = [a for name, a in jobs() if name == "train" and "gpt2-124m" in a]
    assert len(runs) == 3  # looked at, submitted, resumed
    first, *others = (load_settings(a)[0] for a in runs)
    assert others == [first, first]
    assert first.train.exact and first.scale.workers == "1:8"


def test_settings_exist() -> None:
    sections = {name.partition(".")[0] for name in setting_names()}
    named = re.findall(rf"\b(?:{'|'.join(sections)})\.[a-z_]+\b(?!\.)", TEXT)
    wrong = set(named) - set(setting_names()) - {"train.py"}
    assert len(named) > 30 and not wrong


def ray_commands() -> Iterator[list[str]]:
    for line in LINES:
        if re.match(r"ray (?!--)", line):
            yield words(line.partition(" > ")[0])[1:]


def test_ray_has_these_commands_and_options() -> None:
    commands = list(ray_commands())
    assert len(commands) >= 15
    for command, *rest in commands:
        known: Any = cli.commands[command]
        if hasattr(known, "commands"):
            known, rest = known.commands[rest[0]], rest[1:]
        known.make_context(command, rest)  # raises a UsageError


def test_a_wrong_option_of_ray_would_be_noticed() -> None:
    for command, rest in (("down", ["-y", "--all", "x.yaml"]), ("up", ["-y"])):
        with pytest.raises(click.UsageError):
            cli.commands[command].make_context(command, rest)


def test_policies_parse_and_are_narrow() -> None:
    files = documents()
    for name in re.findall(r"file://(\S+)", "".join(BLOCKS)):
        assert name in files
    head = {s["Sid"]: s for s in files["head-access.json"]["Statement"]}
    for statement in [*head.values(), *files["bucket-access.json"]["Statement"]]:
        assert statement["Effect"] == "Allow"
        actions = statement["Action"]
        assert not any(
            "*" in action for action in ([actions] if isinstance(actions, str) else actions)
        )
        assert statement["Resource"] != "*" or actions == "ec2:DescribeInstances"
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    worker = cluster["available_node_types"]["gpu_spot"]["node_config"]
    wanted = head["StartMachinesOfThisCluster"]["Condition"]["StringEquals"]
    assert wanted["ec2:InstanceType"] == worker["InstanceType"]
    assert wanted["aws:RequestTag/ray-cluster-name"] == cluster["cluster_name"]
    profile = worker["IamInstanceProfile"]["Name"]
    assert head["GiveWorkersTheirRole"]["Resource"].endswith(f":role/{profile}")
    assert cluster["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] == {
        "Name": "raygpt-head"
    }


def test_the_cluster_file_is_changed_as_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (block,) = (b for b in BLOCKS if b.startswith("sed "))
    command = block.partition("diff ")[0].replace("> my-cluster.yaml", f"> {tmp_path}/my.yaml")
    subprocess.run(["bash", "-euc", command], cwd=ROOT, env=VARIABLES, check=True)
    made = yaml.safe_load((tmp_path / "my.yaml").read_text())
    assert made["provider"]["region"] == VARIABLES["REGION"]
    assert made["provider"]["availability_zone"] == VARIABLES["ZONE"]
    for node in made["available_node_types"].values():
        assert node["node_config"]["ImageId"] == VARIABLES["AMI"]
        assert node["node_config"]["SecurityGroupIds"] == [VARIABLES["SG"]]
    assert "--env RAY_JOB_STOP_WAIT_TIME_S=120" in made["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in made["docker"]["run_options"]
    monkeypatch.chdir(ROOT)
    validate_config(prepare_config(made))


def test_files_exist() -> None:
    named = set(re.findall(r"\b(?:jobs|docs|tests|raygpt)/[\w/-]+\.\w+", TEXT))
    assert {"jobs/train.py", "docs/grafana.json"} <= named
    for name in named:
        assert (ROOT / name).exists(), name
    assert "`docs/walk-through.md`" in (ROOT / "README.md").read_text()


def texts_of_the_package() -> Iterator[str]:
    """Every text in raygpt's source; a zero byte stands for what an f-string puts in."""
    for file in (ROOT / "raygpt").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\0"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_error_messages_are_those_of_the_package() -> None:
    texts = list(texts_of_the_package())
    table = TEXT.partition("## When things go wrong")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 30 and all(len(row) == 4 for row in rows[2:])
    messages = [m[1] for row in rows if row[1] == "raygpt" and (m := re.search("`(.+?)`", row[0]))]
    assert len(messages) > 15
    for message in messages:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert any(re.search(pattern, text, re.S) for text in texts), message
