"""How glibc allocates in the processes of workers; a process reads this as it starts."""

import os

NAME = "GLIBC_TUNABLES"
_TUNABLES = {
    # Kernels allocate and free the same sizes in each step.  Left alone, glibc hands large ones
    # back to the kernel, which fills fresh pages with zeros the next time: up to 10 % of a step.
    "mmap_threshold": 2**30,
    "trim_threshold": 2**32,
    "top_pad": 2**24,
    "arena_max": 1,  # the training thread would have heaps of its own, of 64 MiB
    "hugetlb": 1,
}


def tunables() -> str:
    """The value of ``GLIBC_TUNABLES`` for workers; a user's own goes first."""
    ours = ":".join(f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())
    return os.environ.get(NAME, ours)
