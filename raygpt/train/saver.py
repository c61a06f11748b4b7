"""Checkpoints written beside training: each worker its share, and the loop hardly waits.

Weights and optimizer change only in the update.  Until it comes a thread copies and stores one
part after the other, in the memory of one.  What is left then is copied before the update, and
the next time, when it would be no different, all at once while the step computes its gradient.
A checkpoint counts when rank 0 has heard that every share is stored and writes its metadata.

What it gives up: where steps are short, or on a GPU, memory for a copy of this worker's share; and
where steps are short the time of one copy, in the first checkpoint.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from raygpt import device as devices
from raygpt.storage import Folder, StorageError, patiently
from raygpt.train import checkpoints
from raygpt.train.checkpoints import Checkpoint, Position
from raygpt.train.parts import Part, Snapshots, cut_into_parts, share_of
from raygpt.train.progress import RunLog

_Result = TypeVar("_Result")

SHARES_TIMEOUT = timedelta(hours=2)
"""For the slowest worker to store its share.  A dead one is noticed at once."""
_LOWEST_PRIORITY = 19


class Saver:
    """Writes this worker's share of checkpoints, one at a time, in a thread.

    Args:
        log: rank 0's; None elsewhere.
        patience: seconds for which a storage that refuses is tried again.
        say: told of it.
        saved: called in the background of every worker once a checkpoint counts; rank 0 gets it.
    """

    def __init__(
        self,
        run: Folder,
        metadata: dict[str, Any],
        log: RunLog | None,
        device: torch.device,
        patience: float,
        say: Callable[[str], None],
        saved: Callable[[Position, Checkpoint | None], None],
    ) -> None:
        self._run, self._metadata, self._log, self._patience = run, metadata, log, patience
        self._say = say
        self._saved, self._copier = saved, devices.Copier(device)
        self._snapshots = Snapshots(pinned=device.type == "cuda")
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # Its collectives run in the background, so they cannot share the group of the loop.
        self._group = dist.new_group(backend="gloo", timeout=SHARES_TIMEOUT)
        self._left: list[Part] = []
        """Parts that are not copied yet."""
        self._copies: dict[str, memoryview] = {}
        """The files of those that were copied before their turn."""
        self._lock = threading.Lock()  # of these two
        self._at_once = device.type == "cuda"  # which copies beside what it computes
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(
        self,
        position: Position,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        beside: bool = True,
    ) -> None:
        """Begin with the checkpoint of a position; every worker calls it.

        Waits for the checkpoint before this one, and raises what stopped it.

        Args:
            beside: training goes on meanwhile, and goes first.  If it ends here, nothing does: a
                job that is stopped has seconds, perhaps on a machine that others fill.
        """
        self.wait()
        parts = share_of(cut_into_parts(model, optimizer), self._rank, self._world_size)
        self._left, self._copies = list(parts), {}
        self._copied.clear()
        self._copier.mark()
        self._thread = threading.Thread(
            target=self._save, args=(position, parts, beside), name="save", daemon=True
        )
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Return when weights and optimizer may change; raises what stopped the copy."""
        if not self._copied.is_set():
            if self._at_once:
                self._copied.wait()
            else:
                self._at_once = self._copy_what_is_left()
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Return when all that was begun is stored.

        Raises:
            StorageError: the storage refused for longer than the patience.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(self, position: Position, parts: list[Part], beside: bool) -> None:
        try:
            if self._at_once:
                self._copy_what_is_left()
            if beside:
                _give_way()
            self._store(position, parts)
        except BaseException as error:  # for the loop, which takes it in its own thread
            self._error = error
        finally:
            self._copied.set()

    def _copy_what_is_left(self) -> bool:
        """Copy all parts whose turn has not come; whether there were any."""
        with self._lock:
            left, self._left = self._left, []
            try:
                with self._copier:
                    for part in left:
                        self._copies[part.file] = self._snapshots.take(part, part.file)
            except BaseException as error:
                self._error = error
            self._copied.set()
            return bool(left)

    def _copy(self, part: Part) -> memoryview:
        """The file of a part whose turn it is; valid until that of the next one."""
        with self._lock:
            if self._error is not None:
                raise self._error
            if part.file in self._copies:
                return self._copies[part.file]
            del self._left[0]
            data = self._snapshots.take(part)
            if not self._left:
                self._copied.set()
            return data

    def _store(self, position: Position, parts: list[Part]) -> None:
        began = time.perf_counter()
        folder = self._run.child(checkpoints.checkpoint_name(position.step))
        entries = {
            part.file: self._patiently(
                partial(checkpoints.write_file, folder, part.file, self._copy(part))
            )
            for part in parts
        }
        shares: list[Any] = [None] * self._world_size
        dist.all_gather_object(shares, entries, group=self._group)
        checkpoint: Checkpoint | None = None
        if self._log is not None:
            self._log.flush()  # a checkpoint must not outlive the steps before it
            files = {file: entry for share in shares for file, entry in share.items()}
            checkpoint = self._patiently(
                partial(checkpoints.commit, folder, position, files, self._metadata)
            )
            try:
                checkpoints.prune(self._run, checkpoint)
            except StorageError as error:  # no reason to stop: the next one deletes it, too
                self._say(str(error))
            self._log.event(
                "checkpoint",
                position.step,
                f"{checkpoint.folder.split()[1]} in {time.perf_counter() - began:.2f} s, weights "
                f"{checkpoint.weights_sha256[:12]}",
            )
        dist.barrier(self._group)  # it counts from here on
        self._saved(position, checkpoint)

    def _patiently(self, action: Callable[[], _Result]) -> _Result:
        return patiently(action, self._patience, self._say)


def _give_way() -> None:
    """Let the training thread go first."""
    if sys.platform == "linux":  # elsewhere threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
