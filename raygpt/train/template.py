"""The template: a process that imports what all of a run's need, and then forks them.

Ray starts each process from nothing, and each imports torch and Ray again, which takes seconds of
a core: on two cores, nearly all of the time until the first step.  What runs start instead
(``forked.py``) asks for a copy of this process, which is there in milliseconds.  A local run starts
it before anything else, and it imports while the driver does its part.  On a cluster each node has
one for a job, as long as workers may come.

What it gives up: to be independent of how Ray starts its processes; modules are imported before
the environment of a process is known; Linux only.  Without a template, or should it die, processes
start as Ray starts them.
"""

import gc
import json
import math
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import IO, Any

from raygpt.train import forked, malloc

_BEFORE_RAY = "torch", "torch._dynamo"
_SETUP = "ray._private.workers.setup_worker"
_MODULES = _SETUP, "raygpt.train.control", "raygpt.train.trainer", "raygpt.train.processes"
_ENVIRONMENT = {
    # Only a process with a single thread can be forked safely.
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
_FIRST_JOB = "01000000"
IDLE_SECONDS = 60.0
"""After which a node's template ends, if it has no copies and nobody asks."""
_LOOK_SECONDS = 5.0


class Template:
    """The running template.

    Args:
        folder: for its socket; nobody else may look into it, so nobody else can connect.

    Raises:
        OSError: the name of the folder is too long for a socket.
    """

    def __init__(self, folder: str) -> None:
        self.address = str(Path(folder) / "template")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(forked.BACKLOG)
            number = listener.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(number)],
                env={**os.environ, malloc.NAME: malloc.tunables()},
                stdin=subprocess.PIPE,  # closed with this process, however that ends
                pass_fds=[number],
                start_new_session=True,  # Ctrl-C is for the driver
                text=True,
            )

    def serve(self, raylet: int) -> None:
        """Have copies serve the first job of a Ray, in this process's environment.

        Args:
            raylet: process id of the raylet.
        """
        # Ray's library reads them once, as it is loaded.
        of_job = {"RAY_RAYLET_PID": str(raylet), "RAY_JOB_ID": _FIRST_JOB}
        assert self.process.stdin is not None
        with suppress(OSError):  # it has died
            print(json.dumps([dict(os.environ), of_job]), file=self.process.stdin, flush=True)


@contextmanager
def started(wanted: bool) -> Iterator[Template | None]:
    """A template, while this lasts; its copies may live on."""
    if not wanted or sys.platform != "linux":
        yield None
        return
    with TemporaryDirectory(prefix="raygpt-", ignore_cleanup_errors=True) as folder:
        try:
            template = Template(folder)
        except OSError:
            yield None
            return
        try:
            yield template
        finally:
            template.process.kill()
            template.process.communicate()


def main() -> None:
    """The arguments are the file number of a socket that listens, and on a cluster its address."""
    gc.disable()  # collections would take a tenth of the imports' time
    os.environ.update(_ENVIRONMENT)
    number, *address = sys.argv[1:]
    with socket.socket(fileno=int(number)) as listener:
        for module in _BEFORE_RAY:
            import_module(module)
        request = _serve_node(listener, *address) if address else _serve_local(listener)
    if request is not None:
        _become(request)


def _serve_local(listener: socket.socket) -> dict[str, Any] | None:
    """Until the driver, which has started this, ends."""
    line = sys.stdin.readline()
    if not line:
        return None
    environment, of_job = json.loads(line)
    os.environ.update({**environment, **_ENVIRONMENT, **of_job})
    _import_ray()
    return _serve(listener, sys.stdin, of_job, math.inf) if _can_be_copied() else None


def _serve_node(listener: socket.socket, address: str) -> dict[str, Any] | None:
    """Until the raylet ends, or nobody needs this any more."""
    of_job = {name: os.environ[name] for name in forked.OF_JOB}
    with suppress(OSError), open(os.pidfd_open(int(of_job["RAY_RAYLET_PID"])), "rb") as life:
        _import_ray()
        if _can_be_copied():
            return _serve(listener, life, of_job, IDLE_SECONDS)
    Path(address + forked.NO_TEMPLATE).touch()
    return None


def _import_ray() -> None:
    """Import what is left, without that Ray's library draws a random number.

    Its generator would be the same in all copies, and two of them would name different things
    alike.  Ray draws one for each class of actors that a module defines.
    """
    library: Any = import_module("ray._raylet")
    actor: Any = import_module("ray.actor")
    of_class = library.ActorClassID
    actor.ActorClassID = SimpleNamespace(from_random=lambda: of_class(os.urandom(of_class.size())))
    try:
        for module in _MODULES:
            import_module(module)
        import_module("raygpt.train.processes").import_all()
    finally:
        actor.ActorClassID = of_class


def _can_be_copied() -> bool:
    """Whether this process has one thread, and two copies can use GPUs and draw different random
    numbers."""
    library, cuda = import_module("ray._raylet"), import_module("torch.cuda")
    drawn = set()
    for _ in range(2):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            number = library.PlacementGroupID.of(library.JobID.from_int(1)).binary()
            os.write(writer, b"" if cuda._is_in_bad_fork() else number)
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        drawn.add(os.read(reader, 100))
        os.close(reader)
    return len(drawn) == 2 and len(os.listdir("/proc/self/task")) == 1


def _serve(
    listener: socket.socket, life: IO[Any], of_job: dict[str, str], idle_seconds: float
) -> dict[str, Any] | None:
    """Fork for each request of this job; returns it in the child, and nothing when nobody needs
    this any more.

    Args:
        life: can be read when this shall end.
        idle_seconds: after which it ends, too, if it has no copies and nobody asks.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that have ended
    gc.freeze()  # else a copy's first collection would write to all of it
    asked, copies = time.monotonic(), list[int]()
    while True:
        watched: list[Any] = [listener, life]
        ready, _, _ = select.select(watched, [], [], _LOOK_SECONDS)
        if life in ready:
            return None
        if not ready:
            copies = [copy for copy in copies if os.path.exists(f"/proc/{copy}")]
            if not copies and time.monotonic() > asked + idle_seconds:
                return None
            continue
        asked = time.monotonic()
        with suppress(OSError, ValueError), listener.accept()[0] as connection:
            _, files, _, _ = socket.recv_fds(connection, 1, 3)
            with connection.makefile("rb") as stream:
                request: dict[str, Any] = json.load(stream)
            known = of_job.items() <= request["environment"].items()
            copy = os.fork() if known else None
            for number, file in enumerate(files):
                if copy == 0:
                    os.dup2(file, number)
                os.close(file)
            if copy == 0:
                return request
            if copy:
                copies.append(copy)
                connection.sendall(b".")


def _become(request: dict[str, Any]) -> None:
    """Go on as Ray's process that was asked for; what its ``setup_worker.py`` does, and then the
    program itself, without starting Python again."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    os.setpgid(0, 0)  # Ray kills a process's group with it
    os.chdir(request["folder"])
    os.setpriority(os.PRIO_PROCESS, 0, request["niceness"])
    os.environ.clear()
    os.environ.update(request["environment"])
    import_module("numpy").random.seed()  # Python's own generators are afresh in each copy
    setup = import_module(_SETUP)
    asked, arguments = setup.parser.parse_known_args(request["arguments"])
    context = setup.RuntimeEnvContext.deserialize(asked.serialized_runtime_env_context or "{}")
    import_module("ray._private.utils").update_envs(context.env_vars)
    program = next(a for a in arguments if a.endswith(forked.PROGRAM))
    sys.argv = arguments[arguments.index(program) :]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
