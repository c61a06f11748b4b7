"""What workers can be asked for, and how a group of them ends that makes way."""

from typing import NamedTuple

MAKE_WAY, STOP = 0, 1
"""Positions of the votes."""


class MakeWay(Exception):
    """Ends this group of workers, which has nothing to save; another one goes on."""


class Requests(NamedTuple):
    """How often each request was made since the driver began."""

    make_way: int = 0
    stop: int = 0
    rescue: int = 0
