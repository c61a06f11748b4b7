"""What a local run starts, and what its driver does without."""

import subprocess
import sys

import psutil
import pytest
from ray.train.constants import TRAIN_ENV_VARS
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from raygpt.train import agent
from raygpt.train.cluster import passed_on

OF_OTHER_LIBRARIES = {
    "TUNE_ONLY_STORE_CHECKPOINT_SCORE_ATTRIBUTE",
    "JAX_DISTRIBUTED_SHUTDOWN_TIMEOUT_S",
}


def test_the_driver_imports_neither_torch_nor_ray_train() -> None:
    """They take seconds, and the template imports them meanwhile."""
    script = (
        "import sys\n"
        "import raygpt.train.driver, raygpt.train.cluster, raygpt.train.control\n"
        "import raygpt.train.lead\n"
        "print(*{'torch', 'ray', 'ray.train', 'ray.data'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["ray"], done.stderr


def test_what_stands_for_the_agent_ends_with_its_raylet() -> None:
    script = (
        "import os, subprocess, sys\n"
        "os.environ['RAY_RAYLET_PID'] = str(os.getpid())\n"
        f"print(subprocess.Popen([sys.executable, '-S', {agent.__file__!r}]).pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as raylet:
        assert raylet.stdout is not None
        process = psutil.Process(int(raylet.stdout.readline()))
        with pytest.raises(psutil.TimeoutExpired):
            process.wait(3 * agent.CHECK_SECONDS)
        raylet.kill()
        raylet.stdout.close()
    process.wait(30)


def test_what_ray_train_reads_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on the cluster, which has another environment than the driver."""
    names = {*ENV_VARS_TO_PROPAGATE, *TRAIN_ENV_VARS, "GLIBC_TUNABLES"} - OF_OTHER_LIBRARIES
    for name in names:
        monkeypatch.setenv(name, "1")
    assert set(passed_on()) >= names
    for name in names:
        monkeypatch.delenv(name)
    assert not names & set(passed_on()) and "PATH" not in passed_on()
