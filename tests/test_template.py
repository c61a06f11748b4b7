"""Copies of the template: what they are asked to be, and processes without it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from head import ROOT

from raygpt.train import forked
from raygpt.train.template import Template, started

pytestmark = pytest.mark.xdist_group("template")
PROGRAM = """
import json, os, random, sys, threading

def draw():
    if "ray" not in sys.modules:
        return []
    import numpy
    from ray._raylet import JobID, PlacementGroupID
    ours = PlacementGroupID.of(JobID.from_int(1)).hex()
    other = []
    thread = threading.Thread(target=lambda: other.append(PlacementGroupID.of(JobID.from_int(1))))
    thread.start()
    thread.join()
    return [ours, other[0].hex(), random.random(), numpy.random.random()]

told = {
    "arguments": sys.argv,
    "torch": "torch._dynamo" in sys.modules,
    "name": __name__,
    "folder": os.getcwd(),
    "variables": dict(os.environ),
    "group": os.getpgid(0) == os.getpid(),
    "files": sorted(os.listdir("/proc/self/fd")),
    "threads": threading.active_count(),
    "niceness": os.nice(0),
    "drawn": draw(),
}
print(json.dumps(told), flush=True)
for line in sys.stdin:
    print(line, end="", flush=True)
"""


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with started(wanted=True) as template:
        assert template is not None
        template.serve(os.getpid())
        yield template


@pytest.fixture
def program(tmp_path: Path) -> str:
    """In place of Ray's, which would look for its raylet."""
    file = tmp_path / "default_worker.py"
    file.write_text(PROGRAM)
    (tmp_path / "setup_worker.py").write_text(f"exec(open({str(file)!r}).read())")
    return str(file)


def asked(
    template: Template | SimpleNamespace, program: str, *more: str, **variables: str
) -> "subprocess.Popen[str]":
    """A process, started as a raylet starts it."""
    environment = {
        **os.environ,
        forked.TEMPLATE: template.address,
        "RAY_RAYLET_PID": str(os.getpid()),
        "RAY_JOB_ID": "01000000",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, forked.__file__, "-s", program, "--node-id=1", *more],
        env=environment,
        cwd=Path(program).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(template: Template, program: str, *more: str, **variables: str) -> dict[str, Any]:
    """What such a process tells."""
    with asked(template, program, *more, **variables) as process:
        assert process.stdout is not None
        told: dict[str, Any] = json.loads(process.stdout.readline())
    return told


def context(**entries: Any) -> str:
    return f"--serialized-runtime-env-context={json.dumps(entries)}"


def test_a_copy_is_what_was_asked_for(template: Template, program: str) -> None:
    entries = context(env_vars={"COLOR": "blue", "BOTH": "${COLOR}"})
    told = ask(template, program, "--language=PYTHON", entries, OWN="1")
    assert told["torch"], "it was not forked"
    assert told["arguments"] == [program, "--node-id=1"] and told["name"] == "__main__"
    assert told["folder"] == str(Path(program).parent)
    expected = {"COLOR": "blue", "BOTH": "blue", "OWN": "1"}
    assert expected.items() <= told["variables"].items()
    assert "OPENBLAS_NUM_THREADS" not in told["variables"], "that of the template alone"
    assert told["group"], "Ray would kill the template, and all other copies, with it"
    assert told["files"][:3] == ["0", "1", "2"] and len(told["files"]) <= 4, "it keeps files open"
    assert told["threads"] == 1 and told["niceness"] == os.nice(0)


def test_no_two_copies_draw_the_same_random_numbers(template: Template, program: str) -> None:
    """Ray names its tasks and placement groups by them."""
    drawn = [ask(template, program)["drawn"] for _ in range(3)]
    numbers = [number for three in drawn for number in three]
    assert len(numbers) == 12 == len(set(numbers))


def test_nothing_is_kept_of_copies_that_have_ended(template: Template, program: str) -> None:
    ask(template, program)
    children = psutil.Process(template.process.pid).children()
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left


@pytest.mark.parametrize(
    ("more", "variables"),
    [
        ((), {"RAY_JOB_ID": "02000000"}),
        ((), {"RAY_RAYLET_PID": "1"}),
        ((), {forked.TEMPLATE: "/nowhere"}),
        (("--language=PYTHON", context(command_prefix=["true", "&&"])), {}),
        (("--language=PYTHON", context(py_executable="uv run python")), {}),
    ],
)
def test_what_it_cannot_be_is_started_as_ray_starts_it(
    template: Template, program: str, more: tuple[str, ...], variables: dict[str, str]
) -> None:
    told = ask(template, program, *more, **variables)
    assert not told["torch"]
    first = str(Path(program).with_name("setup_worker.py")) if more else program
    passed_on = ["-s", program, "--node-id=1", *more] if more else ["--node-id=1"]
    assert told["arguments"] == [first, *passed_on]


def test_copies_outlive_it_and_without_it_processes_start(program: str) -> None:
    with started(wanted=True) as template:
        assert template is not None
        template.serve(os.getpid())
        with asked(template, program) as copy:
            assert copy.stdout is not None
            assert json.loads(copy.stdout.readline())["torch"]
            template.process.send_signal(signal.SIGKILL)
            template.process.wait()
            assert not ask(template, program)["torch"]
            assert copy.stdin is not None
            print("and you?", file=copy.stdin, flush=True)
            assert copy.stdout.readline() == "and you?\n"


def test_it_ends_with_who_started_it(tmp_path: Path) -> None:
    script = (
        "import os, time\n"
        "from raygpt.train.template import Template\n"
        f"template = Template({str(tmp_path)!r})\n"
        "template.serve(1)\n"
        "print(template.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        process = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    process.wait(60)


class Node:
    """A node of a cluster, with something in place of its raylet, which runs until it is told."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.raylet = subprocess.Popen(["sleep", "600"])
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, program: str, **variables: str) -> "subprocess.Popen[str]":
        """A process, started as Ray starts it there for a run."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_RAYLET_PID": str(self.raylet.pid),
            "RAY_JOB_ID": "05000000",
            **variables,
        }
        process = subprocess.Popen(
            ["bash", "-c", f"exec {forked.COMMAND} {program} --raylet-name={self.folder}/raylet"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def ask(self, program: str, **variables: str) -> dict[str, Any]:
        """What such a process tells."""
        return read(self.start(program, **variables))

    def templates(self) -> list[psutil.Process]:
        """They are children of what started their first copies, a raylet's in earnest."""
        found = []
        for child in psutil.Process().children():
            with suppress(psutil.ZombieProcess):
                words = child.cmdline()
                if "raygpt.train.template" in words and words[-1].startswith(str(self.folder)):
                    found.append(child)
        return found

    def end(self) -> None:
        self.raylet.kill()
        self.raylet.wait()
        _, left = psutil.wait_procs(self.templates(), timeout=30)
        for process in self.processes:
            process.kill()
            process.communicate()
        assert not left, "they end with the raylet"


def read(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    told: dict[str, Any] = json.loads(process.stdout.readline())
    return told


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node")
    yield node
    node.end()


def test_the_first_process_of_a_job_on_a_node_becomes_its_template(
    node: Node, program: str
) -> None:
    processes = [node.start(program) for _ in range(3)]
    for process in processes:
        told = read(process)
        assert told["torch"] and told["name"] == "__main__" and told["group"]
        assert told["arguments"] == [program, f"--raylet-name={node.folder}/raylet"]
    (template,) = node.templates()
    assert template.pid in {process.pid for process in processes}
    (address,) = node.folder.glob("raygpt-*[0-9a-f]")
    assert address.stat().st_mode & 0o077 == 0, "for nobody else"
    assert node.ask(program, OPENBLAS_NUM_THREADS="7")["variables"]["OPENBLAS_NUM_THREADS"] == "7"
    assert len(node.templates()) == 2, "one for each environment"


OTHER_USER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
os.setuid(65534)
listener.listen()
print(flush=True)
while True:
    print(len(listener.accept()[0].recv(1000)), flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_one_that_died_or_is_of_another_user_is_replaced(node: Node, program: str) -> None:
    """Another user's would be told this user's token."""
    node.ask(program)
    (template,) = node.templates()
    template.kill()
    template.wait()
    assert node.ask(program)["torch"]
    (template,) = node.templates()
    template.kill()
    template.wait()
    (address,) = node.folder.glob("raygpt-*[0-9a-f]")
    address.unlink()
    command = [sys.executable, "-c", OTHER_USER, str(address)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        told = node.ask(program)
        other.kill()
        assert set(other.stdout.read().split()) == {"0"}, "it was looked at, and told nothing"
    assert told["torch"]


SOON = """
import sys
from raygpt.train import forked, template
template.IDLE_SECONDS, template._LOOK_SECONDS = 0.5, 0.1
with forked._listen(sys.argv[1]) as listener:
    sys.argv[1:] = [str(listener.detach()), sys.argv[1]]
template.main()
"""


def test_one_of_a_node_ends_when_nobody_needs_it(tmp_path: Path, program: str) -> None:
    address = str(tmp_path / "template")
    job = {"RAY_RAYLET_PID": str(os.getpid()), "RAY_JOB_ID": "01000000"}
    with subprocess.Popen(
        [sys.executable, "-c", SOON, address],
        env={**os.environ, "PYTHONPATH": str(ROOT), **job},
    ) as template:
        while not os.path.exists(address):
            assert template.poll() is None
            time.sleep(0.05)
        with asked(SimpleNamespace(address=address), program) as copy:
            assert read(copy)["torch"]
            with pytest.raises(subprocess.TimeoutExpired):
                template.wait(2)  # it has a copy
        assert template.wait(10) == 0


def test_where_processes_cannot_be_copied_that_is_tried_once(node: Node, program: str) -> None:
    """What stands for the raylet has ended, so nothing would tell when a template must."""
    node.raylet.kill()
    node.raylet.wait()
    for _ in range(2):
        assert not node.ask(program)["torch"]
    assert len(list(node.folder.glob(f"*{forked.NO_TEMPLATE}"))) == 1
    first, second = node.processes
    assert first.wait(30) == 0, "it was to become the template"
    assert second.poll() is None, "it is the process itself"


def test_where_nothing_is_wanted_nothing_is_started() -> None:
    before = psutil.Process().children()
    with started(wanted=False) as template:
        assert template is None
        assert psutil.Process().children() == before
