"""Where the nodes of a test cluster run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import psutil
from helpers import free_port


class Host(Protocol):
    """A machine, or what stands for one."""

    address: str
    environment: dict[str, str]
    """What programs need to know there."""

    def command(self, *words: str) -> list[str]:
        """A command that runs ``words`` there, in the same process."""

    def port(self) -> int:
        """A port of its address that nobody listens on."""

    def inside(self) -> AbstractContextManager[None]:
        """While this lasts, sockets of this thread are opened there."""

    def family(self, root: int) -> list[psutil.Process]:
        """The living processes of a node that was started there as process ``root``."""


class LocalHost:
    """This machine's loopback address, which any number of nodes may share."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}

    def command(self, *words: str) -> list[str]:
        return [*words]

    def port(self) -> int:
        return free_port()

    @contextmanager
    def inside(self) -> Iterator[None]:
        yield

    def family(self, root: int) -> list[psutil.Process]:
        """The process and those that came of it; not what lost its parent."""
        try:
            process = psutil.Process(root)
            if process.status() != psutil.STATUS_ZOMBIE:
                return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            pass
        return []
