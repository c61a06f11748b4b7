"""What the README says exists, and its examples are accepted."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from raygpt.presets import PRESETS
from raygpt.settings import load_settings
from raygpt.values import setting_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_files_exist() -> None:
    jobs = set(re.findall(r"\bjobs/\w+\.py", README))
    assert len(jobs) >= 4
    listed = set(re.findall(r"`((?:raygpt|jobs|tests|docs|deploy)/[\w/.]*)`", README))
    for name in {*jobs, *listed, "LICENSE", "cluster.yaml", "constraints.txt"}:
        assert (ROOT / name).exists(), name


def test_settings_and_presets_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```yaml\n# (\S+)\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    Path(example[0]).write_text(example[1])
    commands = re.findall(r"^python jobs/train\.py (.*)$", README, re.M)
    assert len(commands) >= 2
    for command in commands:
        load_settings(shlex.split(command))
    for name in re.findall(r"`(gpt[23]-\w+)`", README):
        assert name in PRESETS
    for name in re.findall(r"--([a-z]+\.[a-z_]+)", README):
        assert name in setting_names()


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"grep -m 1 '(.*?)' README\.md", script)
    found = subprocess.run(["grep", pattern, "README.md"], cwd=ROOT, capture_output=True, text=True)
    (command,) = found.stdout.splitlines()
    assert command.startswith("python3 -m venv .venv && ") and "-c constraints.txt" in command
    (training,) = re.findall(r"^python3 -m venv .*jobs/train\.py$", README, re.M)
    assert "-c constraints.txt -e . " in training
