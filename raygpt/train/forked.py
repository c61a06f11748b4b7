"""What Ray starts for each process of a run: asks a template for a copy of itself.

On a local Ray it stands in for Ray's ``setup_worker.py`` and gets its arguments; the driver has
started the template.  On a cluster it stands in for Python (``py_executable`` of the runtime
environment, :data:`COMMAND`), and the first one on a node becomes the template of its job there.
It imports neither torch nor Ray, so it takes a fiftieth of a second.
"""

import fcntl
import hashlib
import json
import os
import shlex
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

TEMPLATE = "RAYGPT_TEMPLATE"
"""Environment variable with the address of a local Ray's template."""
OF_JOB = {"RAY_RAYLET_PID", "RAY_JOB_ID"}
"""Environment variables in which a template and its copies must agree."""
PROGRAM = "default_worker.py"
_PYTHON = shlex.quote(sys.executable)
COMMAND = f'"$([ -x {_PYTHON} ] && echo {_PYTHON} || echo python)" -m raygpt.train.forked'
"""For bash; a node that has no Python where the driver has it is asked for its own."""
NO_TEMPLATE = ".none"
"""Ends the name of a file that says that this node's processes cannot be copied."""
BACKLOG = 128
_CONTEXT = "--serialized-runtime-env-context="
_RAYLET = "--raylet-name="


def main() -> None:
    arguments = sys.argv[1:]
    context = _option(arguments, _CONTEXT)
    if _is_plain(context):
        address = os.environ.get(TEMPLATE) or _of_node(arguments)
        if address and _ask(address, arguments):
            return
    program = next(a for a in arguments if a.endswith(PROGRAM))
    first = [str(Path(program).with_name("setup_worker.py"))] if context else []
    os.execv(sys.executable, [sys.executable, *first, *arguments])


def _option(arguments: list[str], name: str) -> str | None:
    return next((a.removeprefix(name) for a in arguments if a.startswith(name)), None)


def _is_plain(context: str | None) -> bool:
    """Whether the process shall run as this one does, not by ``uv run`` or in a container."""
    asked = json.loads(context or "{}")
    python = asked.get("py_executable") or sys.executable
    return python == sys.executable and not asked.get("command_prefix")


def _of_node(arguments: list[str]) -> str | None:
    """The address of this node's template for processes like this; where there is none yet, this
    one becomes it, and goes on here as another.  None if there can be none."""
    raylet = _option(arguments, _RAYLET)
    if raylet is None or not OF_JOB <= os.environ.keys() or sys.platform != "linux":
        return None
    alike = [raylet, os.getcwd(), sorted(os.environ.items())]  # with the job, and its raylet
    key = hashlib.sha256(repr(alike).encode()).hexdigest()[:12]
    address = str(Path(raylet).with_name(f"raygpt-{key}"))
    with suppress(OSError), open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(address + NO_TEMPLATE):
            return None
        with suppress(OSError), _connected(address):
            return address
        with suppress(FileNotFoundError):
            os.unlink(address)  # of one that has ended
        listener = _listen(address)
        if os.fork():
            # A child of Ray's daemon, as all processes of a node are.
            os.set_inheritable(listener.fileno(), True)
            program = ("-m", "raygpt.train.template", str(listener.fileno()), address)
            os.execv(sys.executable, [sys.executable, *program])
        listener.close()
        return address
    return None


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o077)  # for nobody else
    try:
        listener.bind(address)
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    return listener


def _connected(address: str) -> socket.socket:
    """To a template of this user.

    Raises:
        OSError: there is none.
    """
    template = socket.socket(socket.AF_UNIX)
    try:
        template.connect(address)
        if not is_own(template):
            raise PermissionError(address)
    except BaseException:
        template.close()
        raise
    return template


def is_own(peer: socket.socket) -> bool:
    """Whether a process of this user is at the other end of a Unix socket."""
    told = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", told)[1] == os.getuid())


def _ask(address: str, arguments: list[str]) -> bool:
    """Whether the template has started the process."""
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "niceness": os.nice(0),
    }
    try:
        with _connected(address) as template:
            socket.send_fds(template, [b"."], [0, 1, 2])
            template.sendall(json.dumps(request).encode())
            template.shutdown(socket.SHUT_WR)
            return bool(template.recv(1))
    except OSError:
        return False


if __name__ == "__main__":
    main()
