"""What a local Ray starts for each of its processes: asks the template for a copy of itself.

It stands in for Ray's ``setup_worker.py`` and gets its arguments.  It imports neither torch nor
Ray, so it takes a fiftieth of a second.
"""

import json
import os
import socket
import sys
from pathlib import Path

TEMPLATE = "RAYGPT_TEMPLATE"
"""Environment variable with the address of the template."""
PROGRAM = "default_worker.py"
_CONTEXT = "--serialized-runtime-env-context="


def main() -> None:
    arguments = sys.argv[1:]
    context = next((a.removeprefix(_CONTEXT) for a in arguments if a.startswith(_CONTEXT)), None)
    if _is_plain(context) and _ask(arguments):
        return
    program = next(a for a in arguments if a.endswith(PROGRAM))
    first = [str(Path(program).with_name("setup_worker.py"))] if context else []
    os.execv(sys.executable, [sys.executable, *first, *arguments])


def _is_plain(context: str | None) -> bool:
    """Whether the process shall run as this one does, not by ``uv run`` or in a container."""
    asked = json.loads(context or "{}")
    python = asked.get("py_executable") or sys.executable
    return python == sys.executable and not asked.get("command_prefix")


def _ask(arguments: list[str]) -> bool:
    """Whether the template has started the process."""
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "niceness": os.nice(0),
    }
    try:
        with socket.socket(socket.AF_UNIX) as template:
            template.connect(os.environ[TEMPLATE])
            socket.send_fds(template, [b"."], [0, 1, 2])
            template.sendall(json.dumps(request).encode())
            template.shutdown(socket.SHUT_WR)
            return bool(template.recv(1))
    except (KeyError, OSError):
        return False


if __name__ == "__main__":
    main()
