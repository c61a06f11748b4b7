"""Hosts of their own on one machine: network namespaces at the ports of a bridge.

Everything lies in namespaces whose names begin with this process's, the bridge too, so that
neither two runs nor a run and its machine see each other's traffic.  A link that is cut loses
packets without a word, as a broken switch does.  What it gives up: hosts share processors,
memory and files.
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_NAMES = Path("/run/netns")
_FILES = Path("/etc/netns")
"""Of each namespace, the files that its programs see in place of those of /etc."""
_PREFIX = "raygpt"
_OURS = re.compile(rf"{_PREFIX}-(\d+)-.*")
_SUBNET = "10.77.0"
_HOSTS = "127.0.0.1 localhost\n" + "".join(f"{_SUBNET}.{n} host-{n}\n" for n in range(1, 255))
"""As a cloud's name service would say it; torch asks for the names of all peers."""
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def available() -> str:
    """Why hosts cannot have networks of their own here; empty if they can."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [name for name in ("ip", "iptables") if shutil.which(name) is None]
    return f"{' and '.join(missing)} is not installed" if missing else ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


class NetworkHost:
    """A network namespace with an address of its own."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        # Gloo would look its own address up by the machine's name.
        self.environment = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
        self._ports = itertools.count(20000)

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def port(self) -> int:
        return next(self._ports)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with open("/proc/thread-self/ns/net") as home, open(_NAMES / self.name) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def family(self, root: int) -> list[psutil.Process]:
        return self.processes()

    def processes(self) -> list[psutil.Process]:
        """All that runs here, whoever started it."""
        return processes_in(self.name)

    def cut(self) -> None:
        """Lose every packet between this host and the others."""
        for chain, direction in (("INPUT", "-i"), ("OUTPUT", "-o")):
            _run(*self.command("iptables", "-w", "-A", chain, direction, "eth0", "-j", "DROP"))

    def heal(self) -> None:
        """Lose no more packets."""
        _run(*self.command("iptables", "-w", "-F"))


def _enter(descriptor: int) -> None:
    """Move this thread to the network namespace of an open file."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


class Network:
    """A bridge and the hosts at it; to be used in a ``with`` block, which leaves nothing behind."""

    def __init__(self) -> None:
        self.name = f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.hosts: list[NetworkHost] = []

    def __enter__(self) -> "Network":
        _remove_orphans()
        try:
            _run("ip", "netns", "add", self._switch)
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def _switch(self) -> str:
        return f"{self.name}-switch"

    def add_host(self) -> NetworkHost:
        """One more host, connected to all others."""
        number = len(self.hosts) + 1
        host = NetworkHost(f"{self.name}-{number}", f"{_SUBNET}.{number}")
        self.hosts.append(host)
        files = _FILES / host.name
        files.mkdir(parents=True)
        (files / "hosts").write_text(_HOSTS)
        (files / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses at once
        _run("ip", "netns", "add", host.name)
        # Made where it shall be: the two ends never lie in this machine's own namespace.
        ends = ("link", "add", "eth0", "type", "veth", "peer", "name", f"port{number}")
        _run("ip", "-n", host.name, *ends, "netns", self._switch)
        port = ("link", "set", f"port{number}", "master", "bridge", "up")
        _run("ip", "-n", self._switch, *port)
        _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", host.name, "link", "set", device, "up")
        # It leads nowhere, but Ray finds out its address by asking for the way to the internet.
        _run("ip", "-n", host.name, "route", "add", "default", "dev", "eth0")
        return host

    def __exit__(self, *_: object) -> None:
        for name in self._names():
            _remove(name)

    def leftovers(self) -> list[str]:
        """Namespaces that are still there, or their files; no process outlives them."""
        paths = [folder / name for name in self._names() for folder in (_NAMES, _FILES)]
        return [str(path) for path in paths if path.exists()]

    def _names(self) -> list[str]:
        return [host.name for host in self.hosts] + [self._switch]


def processes_in(name: str) -> list[psutil.Process]:
    """The living processes in a network namespace."""
    try:
        namespace = (_NAMES / name).stat().st_ino
    except FileNotFoundError:
        return []
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            here = os.stat(f"/proc/{process.pid}/ns/net").st_ino == namespace
            if here and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(name: str) -> None:
    """End every process in a network namespace, by id, until there is none."""
    while processes := processes_in(name):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)


def _remove(name: str) -> None:
    kill_all(name)
    with suppress(subprocess.CalledProcessError):  # there is none
        _run("ip", "netns", "delete", name)
    shutil.rmtree(_FILES / name, ignore_errors=True)


def _remove_orphans() -> None:
    """Remove what processes that were killed could not remove themselves."""
    if not _NAMES.exists():
        return
    for path in _NAMES.iterdir():
        match = _OURS.fullmatch(path.name)
        if match and not psutil.pid_exists(int(match[1])):
            _remove(path.name)
