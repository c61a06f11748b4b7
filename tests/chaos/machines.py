"""Machines that can be reached by SSH: hosts of a test network with homes of their own.

Each runs a real sshd, in a mount namespace in which Ray's folder is its own; so is its home.
"""

import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from chaos.network import Network, NetworkHost, available

_SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
_OWN = ("/tmp/ray", "/run/sshd")
"""Folders that every machine has for itself; they lie in its home."""
_START_SECONDS = 30.0


def missing() -> str:
    """Why there can be no such machines here; empty if there can."""
    programs = [name for name in ("rsync", "ssh-keygen", "unshare") if shutil.which(name) is None]
    if not Path(_SSHD).exists():
        programs.append("sshd")
    return available() or (f"{' and '.join(programs)} is not installed" if programs else "")


class Machines:
    """A network of machines, and a key that opens them; to be used in a ``with`` block.

    Args:
        folder: for their homes.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count
        self.key = folder / "key"
        self.hosts: list[NetworkHost] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Machines":
        with ExitStack() as stack:
            network = stack.enter_context(Network())
            _make_key(self.key)
            for _ in range(self._count):
                self._add(network.add_host())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _add(self, host: NetworkHost) -> None:
        home = self.home(host)
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        shutil.copy(self.key.with_suffix(".pub"), home / ".ssh" / "authorized_keys")
        # What a login shell finds: the programs that run the tests, as an image would have them.
        (home / ".bashrc").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
        _make_key(home / "host_key")
        # ssh takes the home folder from there, whatever HOME says.
        users = Path("/etc/passwd").read_text()
        (home / "passwd").write_text(
            re.sub(r"^(root:[^:]*:[^:]*:[^:]*:[^:]*):[^:]*:", rf"\1:{home}:", users, flags=re.M)
        )
        config = home / "sshd_config"
        config.write_text(
            f"ListenAddress {host.address}\nHostKey {home / 'host_key'}\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n"
            "PidFile none\nMaxStartups 50\n"
        )
        with (home / "sshd.log").open("wb") as log:
            subprocess.Popen(
                self.command(host, _SSHD, "-D", "-e", "-f", str(config)),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with host.inside():
                    socket.create_connection((host.address, 22), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    log_text = (home / "sshd.log").read_text()
                    raise RuntimeError(f"sshd did not start:\n{log_text}") from None
                time.sleep(0.05)
        self.hosts.append(host)

    def home(self, host: NetworkHost) -> Path:
        """Where a machine's home folder really lies."""
        return self._folder / host.address

    def command(self, host: NetworkHost, *words: str) -> list[str]:
        """A command that runs ``words`` on a machine, as its root."""
        home, mounts = self.home(host), []
        for folder in map(Path, _OWN):
            for path in (folder, home / folder.name):
                path.mkdir(mode=0o755, exist_ok=True)
            mounts.append(f"mount --bind {home / folder.name} {folder}")
        mounts.append(f"mount --bind {home / 'passwd'} /etc/passwd")
        script = " && ".join([*mounts, f"export HOME={home}", "cd", 'exec "$@"'])
        own = ("unshare", "--mount", "--propagation", "private", "bash", "-c", script, "bash")
        return host.command(*own, *words)


def _make_key(path: Path) -> None:
    command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
    subprocess.run(command, check=True, capture_output=True, timeout=30)
