"""Hosts of their own: they reach each other, unless they are cut off, and leave nothing."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos import network
from chaos.network import Network, NetworkHost, available

pytestmark = pytest.mark.skipif(bool(available()), reason=available())
PORT = 20000


def reaches(host: NetworkHost, other: NetworkHost) -> bool:
    """Whether a program on one host is answered by the other, which listens."""
    try:
        with host.inside(), socket.create_connection((other.address, PORT), timeout=0.5):
            return True
    except OSError:
        return False


def test_a_host_can_be_cut_off_and_reached_again() -> None:
    with Network() as here, Network() as elsewhere:
        one, two, stranger = here.add_host(), here.add_host(), elsewhere.add_host()
        with two.inside():
            listener = socket.create_server((two.address, PORT))
        with listener:
            assert reaches(one, two) and reaches(two, two)
            assert not reaches(stranger, two), "networks are not apart"
            two.cut()
            assert not reaches(one, two) and reaches(two, two)
            two.heal()
            assert reaches(one, two)


def test_names_are_looked_up_without_waiting() -> None:
    """There is no name service; torch would wait for it three times whenever workers start."""
    with Network() as here:
        host = here.add_host()
        for address, name in ((host.address, "host-1"), ("10.77.0.250", "host-250")):
            words = host.command("getent", "hosts", address)
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
            assert done.stdout.split() == [address, name]
        files = Path("/etc/netns") / host.name
        assert files.exists() and str(files) in here.leftovers()
    assert not files.exists()


def test_nothing_outlives_a_network() -> None:
    """Not even what lost its parent."""
    orphan = "import os, time; os.fork() and os._exit(0); os.setsid(); time.sleep(600)"
    with Network() as here:
        host = here.add_host()
        subprocess.run(host.command(sys.executable, "-c", orphan), check=True, timeout=30)
        (process,) = host.processes()
        assert here.leftovers() != []
    assert not process.is_running()
    assert here.leftovers() == []


def test_what_a_killed_process_left_is_removed_by_the_next() -> None:
    code = (
        "from chaos.network import Network; import os, signal, subprocess;"
        "network = Network().__enter__(); host = network.add_host();"
        "null = subprocess.DEVNULL;"
        "subprocess.Popen(host.command('sleep', '600'), stdout=null, stderr=null);"
        "print(host.name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    name = done.stdout.strip()
    deadline = time.monotonic() + 30
    while not network.processes_in(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    (sleeper,) = network.processes_in(name)
    with Network():
        assert not sleeper.is_running()
        assert not network.processes_in(name)
