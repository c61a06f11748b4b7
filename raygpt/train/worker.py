"""The training loop, as each worker runs it.

Every worker holds the whole model, computes its lanes of each step and takes part in the same
sums, so all hold the same weights at every step; rank 0 also writes what is to be kept.
"""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ray
import ray.train
import torch

from raygpt import device as devices
from raygpt.data.corpus import open_corpus
from raygpt.data.reader import WindowReader
from raygpt.data.stream import StepWindows, lane_steps, stream_blocks
from raygpt.errors import UserError
from raygpt.model import GPT
from raygpt.optim import build_optimizer, lr_at
from raygpt.peak import Peak
from raygpt.recompute import WIDE
from raygpt.runs.accounts import FIRST_STEP, RESTORE, TRAIN, Stopwatch, restart_ms
from raygpt.storage import patiently
from raygpt.train import checkpoints, malloc, notice, state
from raygpt.train.checkpoints import Position
from raygpt.train.compiled import CompiledLayers
from raygpt.train.garbage import Garbage
from raygpt.train.gauges import Gauges
from raygpt.train.host import check_reachable, gather_machines
from raygpt.train.job import Job
from raygpt.train.listener import Listener
from raygpt.train.profile import Profiler
from raygpt.train.progress import RunLog, StepRecord
from raygpt.train.records import Recorder
from raygpt.train.reduce import data_parallel
from raygpt.train.resume import resume
from raygpt.train.saver import Saver
from raygpt.train.step import Stepper, StepResult
from raygpt.train.straggler import Stragglers
from raygpt.train.validation import Validation
from raygpt.train.votes import STOP, MakeWay

MAX_SKIPPED_IN_A_ROW = 10


def train_worker(settings: dict[str, Any]) -> None:
    """Train from the latest checkpoint to the end, or until asked to leave.

    Args:
        settings: ``job``, the :class:`Job`, and ``control``, the driver's Control actor.
    """
    began = time.time()
    worker = Worker(settings["job"], Listener(settings["control"]), began)
    try:
        worker.train()
    except (UserError, MakeWay):
        raise
    except Exception:
        # A peer is gone, or what carries the data: this replica still has all finished steps.
        worker.rescue()
        raise


class Worker:
    """Model, optimizer, data and logs of one worker process."""

    def __init__(self, job: Job, listener: Listener, began: float) -> None:
        self.job, self.config, self.listener = job, job.config, listener
        config, context = job.config, ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        check_reachable(job.run, config.run.storage_patience, listener.say)

        self.device = devices.worker_device(config.scale.gpus_per_worker or 0)
        devices.set_up(self.device, config.scale.threads, bool(config.train.exact))
        devices.check_compilers(self.device, config.train.compile)
        self.dtype = devices.resolve_precision(config.train.precision, self.device, listener.say)
        self.peak = Peak(self.device, self.dtype)
        self.recorder = Recorder(config.model, self.peak, self.world_size)

        torch.manual_seed(config.train.seed)
        self.model = GPT(config.model, job.n_vocab).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.position, self.rescued = resume(
            job.run,
            self.model,
            self.optimizer,
            listener,
            quiet=self.rank > 0,
            device=self.device,
            patience=config.run.storage_patience,
        )
        sparing = config.train.activation_checkpointing
        if sparing:
            self.model.checkpoint_activations()
        self.gives_back = self.device.type == "cpu" and (sparing or config.model.n_embd >= WIDE)
        if self.gives_back and sparing:
            malloc.give_back_between_layers(self.model)
        elif self.gives_back:
            malloc.give_back_in_passes(self.model)
        self.compiled: CompiledLayers | None = None
        if config.train.compile:
            self.compiled = CompiledLayers(job.run, self.device, listener.say)
            self.compiled.fetch()
            self.model.compile_layers(
                **devices.compile_options(self.device, bool(config.train.exact))
            )
        self.ddp = data_parallel(self.model)
        patience = config.run.storage_patience
        self.profiler = Profiler(config.train.profile, self.device, job.run, patience, listener.say)
        self.stepper = Stepper(
            self.model,
            self.ddp,
            self.optimizer,
            lanes=config.batch.lanes,
            micro=config.batch.micro,
            grad_clip=config.optim.grad_clip,
            device=self.device,
            dtype=self.dtype,
            seed=config.train.seed,
            part=self.profiler.part,
        )
        self.reader = WindowReader(job.plan)
        self.segments = job.segments(self.position.step)
        self.validation: Validation | None = None
        if job.val_windows:
            self.validation = Validation(
                open_corpus(job.val_corpus),
                config.model.block_size,
                config.train.eval_tokens,
                self.rank,
                self.world_size,
            )
        self._validate_what_was_missed()
        self.unsaved: list[StepRecord] = []
        """Of the steps since the last checkpoint, for the case that rank 0 dies with its files."""
        self.trained = False
        self.whole, self.state_lock = True, threading.Lock()
        """Whether weights, optimizer and position belong to one step; who looks or changes."""
        self.copier = devices.Copier(self.device)
        self.log: RunLog | None = None
        machines, first_here = gather_machines(self.device, self.dtype)
        if first_here:
            notice.watch(listener.say)
        if self.rank == 0:
            self.log = RunLog(job.run, self.position.step, self.rescued, patience, listener.say)
            if self.rescued:
                first = self.rescued[0].metrics["step"]
                self.log.event(
                    "rescue",
                    self.position.step,
                    f"steps from {first} on were saved by workers that outlived others",
                )
            way = f", sums by {self.stepper.way}" if self.world_size > 1 else ""
            self.log.event(
                "start",
                self.position.step,
                f"{self.world_size} workers on {devices.describe(self.device)}, "
                f"{str(self.dtype).removeprefix('torch.')}, {config.scale.threads} threads{way}",
                machines=machines,
            )
        self.saver = Saver(
            job.run,
            job.metadata(),
            self.log,
            self.device,
            patience,
            listener.say,
            self._has_saved,
        )
        self.gauges = Gauges(config.run.name, self.rank, self.log)
        self.stragglers = Stragglers(config.train.straggler_factor, machines)
        self.stopwatch = Stopwatch()
        self.garbage = Garbage()
        self._mark(RESTORE, began)
        listener.rescue = self.rescue

    def train(self) -> None:
        """The loop: one pass a step."""
        config, schedule = self.config, self.job.schedule
        if self.missed:
            self._checkpoint(now=False)  # it may be the best so far
        batches = self._batches()
        self._mark(FIRST_STEP, time.time())
        while self.position.step < config.train.steps:
            with self.profiler.step(self.position.step):
                began = time.perf_counter()
                with self.profiler.part("data"):
                    batch = next(batches)
                data_wait = time.perf_counter() - began

                tokens = schedule.tokens(batch.step)
                lr = lr_at(
                    schedule.tokens_before(batch.step),
                    tokens,
                    max_lr=config.optim.max_lr,
                    min_lr=config.min_lr,
                    warmup_tokens=self.job.warmup_tokens,
                    decay_tokens=self.job.decay_tokens,
                )
                owners = self.segments.owners(batch.segment, self.world_size)
                result = self.stepper.gradient(batch, owners, self.listener.votes(), data_wait)
                began += self._wait_for_copy()  # which is not the step's own time
                with self._changing_state():
                    with self.profiler.part("update"):
                        self.stepper.update(result, lr)
                    self._advance(result, tokens)
                    record = self._record(result, tokens, lr, began, data_wait)
                    self.unsaved.append(record)

                self.garbage.collect()
                self.peak.count_step()
                with self.stopwatch.during("validation"):
                    self._validate(record)
                self._log_step(record)
                self._check_skipped()
                with self.stopwatch.during("checkpoint"):
                    self._checkpoint(now=any(result.votes))
            if any(result.votes):
                self._leave(stop=bool(result.votes[STOP]))
                break
        self.saver.wait()
        if self.log is not None:
            self.log.close()

    def _wait_for_copy(self) -> float:
        """Seconds for which a checkpoint still copied what the update will change."""
        began = time.perf_counter()
        with self.stopwatch.during("checkpoint"):
            self.saver.wait_for_copy()
        return time.perf_counter() - began

    @contextmanager
    def _changing_state(self) -> Iterator[None]:
        """Weights, optimizer and position change together, while nobody copies them."""
        with self.state_lock:
            self.whole = False
            yield
            self.whole = True
            self.copier.mark()

    def rescue(self) -> None:
        """Save the state after the last finished step, when this group of workers cannot go on.

        Replicas are equal, so whichever survivors get to it write the same bytes.  Called by the
        training thread, or by the listener while that one hangs in a collective.
        """
        run = self.job.run
        with self.state_lock:
            if not (self.whole and self.unsaved):
                return
            metadata = {**self.job.metadata(), "steps": [asdict(s) for s in self.unsaved]}

            def save() -> None:
                if not checkpoints.is_finished(run, self.position.step):
                    state.save(run, self.position, self.model, self.optimizer, metadata)

            with self.copier:
                patiently(save, self.config.run.storage_patience)

    def _leave(self, stop: bool) -> None:
        """End this group after a checkpoint.

        Raises:
            MakeWay: unless the run is to stop, another group goes on.
        """
        self.saver.wait()
        if self.position.step == self.config.train.steps:
            return
        if self.log is not None:
            self.log.event("stop" if stop else "leave", self.position.step, "as asked")
            self.log.flush()
        if not stop:
            raise MakeWay(f"made way after step {self.position.step - 1}")

    def _batches(self) -> Iterator[StepWindows]:
        ahead = math.ceil(self.config.batch.lanes / self.world_size)  # a segment's
        blocks = stream_blocks(partial(ray.train.get_dataset_shard, "train"), ahead)
        return lane_steps(self.reader, self.segments, self.rank, self.world_size, blocks)

    def _advance(self, result: StepResult, tokens: int) -> None:
        """Count the step; the same on every worker."""
        p, skipped = self.position, int(result.skipped)
        self.position = Position(
            step=p.step + 1,
            tokens=p.tokens + tokens,
            skipped=p.skipped + skipped,
            skipped_in_a_row=(p.skipped_in_a_row + 1) * skipped,
            best_val_loss=p.best_val_loss,
        )
        if skipped and self.log is not None:
            self.log.event(
                "skip", p.step, f"loss {result.loss}, norm {result.grad_norm}: weights unchanged"
            )

    def _check_skipped(self) -> None:
        """All workers counted the same, so all stop together.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        if self.position.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"loss or gradient norm was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, "
                f"the last at step {self.position.step - 1}: no such step changed the weights; "
                "lower optim.max_lr, lengthen optim.warmup_steps or check the corpus, under "
                "another --run.name"
            )

    def _validate_what_was_missed(self) -> None:
        """Where a group of workers ended between a step and its validation, do that first."""
        self.missed = False
        if self.rescued and self.position.val_loss is None:
            self.missed = self._validate(self.rescued[-1])

    def _validate(self, record: StepRecord) -> bool:
        """If it is due after the step of ``record``, which gets the loss."""
        every, step = self.config.train.eval_every, self.position.step
        due = step == self.config.train.steps or (every and step % every == 0)
        if self.validation is None or not due:
            return False
        loss = self.validation.loss(self.model, self.device, self.dtype)
        self.position = replace(self.position, val_loss=loss.val_loss)
        record.add(loss._asdict())
        return True

    def _checkpoint(self, now: bool) -> None:
        """Write a checkpoint when one is due: by the interval, at the end, for a new best, now."""
        p = self.position
        best = p.val_loss is not None and (p.best_val_loss is None or p.val_loss < p.best_val_loss)
        if best:
            self.position = p = replace(p, best_val_loss=p.val_loss)
        every, last = self.config.train.checkpoint_every, p.step == self.config.train.steps
        if not (now or best or last or p.step % every == 0):
            return
        if self.gives_back:
            malloc.give_back()  # what a step leaves free shall not lie beside the copy
        self.saver.begin(p, self.model, self.optimizer, beside=not (now or last))

    def _has_saved(self, position: Position, checkpoint: checkpoints.Checkpoint | None) -> None:
        """A checkpoint counts: report it to Ray Train; called in the background."""
        with self.state_lock:
            self.unsaved = [r for r in self.unsaved if r.metrics["step"] >= position.step]
        self.gauges.has_saved()
        if self.compiled is not None and self.rank == 0:
            self.compiled.keep()
        reported = None
        if checkpoint is not None:
            storage = ray.train.get_context().get_storage()
            path = f"{storage.experiment_fs_path}/{checkpoint.folder.split()[1]}"
            reported = ray.train.Checkpoint(path, storage.storage_filesystem)
        ray.train.report(
            {"step": position.step, "val_loss": position.val_loss},
            checkpoint=reported,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )

    def _mark(self, phase: str, at: float) -> None:
        if self.rank == 0:
            self.listener.control.mark.remote(phase, at)

    def _record(
        self, result: StepResult, tokens: int, lr: float, began: float, data_wait: float
    ) -> StepRecord:
        seconds = time.perf_counter() - began
        record = self.recorder.record(
            self.position,
            result,
            tokens=tokens,
            lr=lr,
            epoch=self.reader.epoch(self.position.step - 1),
            seconds=seconds,
            data_wait=data_wait,
            between=self.stopwatch.row(1000 * seconds),
        )
        if not self.trained and self.log is not None:
            now = record.metrics["time"]
            marks: Any = ray.get(self.listener.control.marks.remote())
            record.metrics["restart_ms"] = restart_ms(marks, self.log.last_kept, self.log.lost, now)
            self._mark(TRAIN, now)
        self.trained = True
        return record

    def _log_step(self, record: StepRecord) -> None:
        self.gauges.step(record)
        if self.log is not None:
            self.log.check()
            for text in self.stragglers.look(record.metrics["lane_ms"]):
                self.log.event("straggler", record.metrics["step"], text)
            step, log_every = record.metrics["step"], self.config.train.log_every
            board = step % log_every == 0 or step + 1 == self.config.train.steps
            self.log.step(record, board)
