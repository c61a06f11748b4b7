"""What the driver keeps up to date beside a run: report, samples, and that nothing waits for it."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import WEIGHTS_FILE
from logged import record
from resolved import change
from resolved import config as config
from resolved import made as made
from saved import flip_a_bit

from raygpt.config import Config
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.runs.files import REPORT, SAMPLES
from raygpt.runs.history import parse_samples
from raygpt.train import checkpoints, state
from raygpt.train import chronicle as chronicle_module
from raygpt.train.chronicle import Chronicler
from raygpt.train.job import Job, resolve
from raygpt.train.progress import RunLog

DEADLINE_SECONDS = 30.0


@pytest.fixture
def job(config: Config, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(chronicle_module, "INTERVAL_SECONDS", 0.02)
    return resolve(change(config, train__sample_tokens=5))


def save(job: Job, step: int) -> None:
    """A checkpoint of an untrained model, as workers leave it."""
    torch.manual_seed(step)
    model = GPT(job.config.model, job.n_vocab)
    optimizer = build_optimizer(model, job.config.optim)
    state.save(job.run, checkpoints.Position(step=step), model, optimizer, job.metadata())


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def page(job: Job) -> str:
    return job.run.read_bytes(REPORT).decode() if job.run.exists(REPORT) else ""


def test_report_and_samples_follow_the_run(job: Job) -> None:
    said: list[str] = []
    log = RunLog(job.run, 0)
    with Chronicler(job, {"parameters": "1,234"}, said.append) as chronicler:
        for step in range(3):
            log.step(record(step, time=time.time()), board=False)
            wait(lambda step=step: f"step {step + 1} of 124" in page(job))  # type: ignore[misc]
        assert 'class="state running"' in page(job)
        save(job, 3)
        log.event("checkpoint", 3, "checkpoint_00000003")
        wait(lambda: job.run.exists(SAMPLES))
    log.close()
    ((step, text),) = parse_samples(job.run.read_bytes(SAMPLES).decode())
    assert step == 3
    assert chronicler.sample(3).strip("\n") == text
    chronicler.close("stopped", "as asked")
    assert re.search(r'class="state stopped".*as asked', page(job), re.S)
    assert said == []


def test_a_checkpoint_that_is_gone_is_not_sampled(job: Job) -> None:
    save(job, 5)
    chronicler = Chronicler(job, {}, lambda _: None)
    assert chronicler.sample(4) == "" and chronicler.sample(5) != ""
    (job.run.child(checkpoints.checkpoint_name(5))).delete()
    assert chronicler.sample(5) != ""  # known from before


def test_without_a_prompt_nothing_is_sampled_or_imported_for_it(job: Job) -> None:
    save(job, 5)
    silent = replace(job, config=change(job.config, train__sample_prompt=""))
    log = RunLog(silent.run, 0)
    with Chronicler(silent, {}, lambda _: None) as chronicler:
        log.event("checkpoint", 5, "checkpoint_00000005")
        log.close()
        wait(lambda: "checkpoint_00000005" in page(silent))
    assert chronicler.sample(5) == "" and "_sampler" not in vars(chronicler)
    assert not silent.run.exists(SAMPLES)


def test_a_damaged_checkpoint_is_said_instead_of_sampled(job: Job) -> None:
    save(job, 5)
    flip_a_bit(Path(job.run.path) / checkpoints.checkpoint_name(5) / WEIGHTS_FILE)
    said: list[str] = []
    log = RunLog(job.run, 0)
    with Chronicler(job, {}, said.append):
        log.event("checkpoint", 5, "checkpoint_00000005")
        for step in range(3):
            log.step(record(step, time=time.time()), board=False)
            wait(lambda step=step: f"step {step + 1} of 124" in page(job))  # type: ignore[misc]
        wait(lambda: bool(said))
    log.close()
    (text,) = said
    assert text.startswith("cannot sample text: ") and "sha256 does not match" in text


def test_an_earlier_checkpoint_is_left_to_the_workers(job: Job) -> None:
    """They check it before they train on, and say what is wrong; a sample of it would say it
    twice."""
    save(job, 5)
    flip_a_bit(Path(job.run.path) / checkpoints.checkpoint_name(5) / WEIGHTS_FILE)
    save(job, 4)
    said: list[str] = []
    earlier = RunLog(job.run, 0)
    earlier.event("checkpoint", 5, "checkpoint_00000005")
    earlier.close()
    with Chronicler(job, {}, said.append):
        log = RunLog(job.run, 0)
        log.event("checkpoint", 4, "checkpoint_00000004")
        wait(lambda: job.run.exists(SAMPLES))
    log.close()
    ((step, _),) = parse_samples(job.run.read_bytes(SAMPLES).decode())
    assert step == 4 and not said


def test_large_models_are_sampled_at_the_end_only(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chronicle_module, "SAMPLED_BYTES", 1000)
    save(job, 3)
    log = RunLog(job.run, 0)
    with Chronicler(job, {}, lambda _: None) as chronicler:
        log.step(record(0, time=time.time()), board=False)
        log.event("checkpoint", 3, "checkpoint_00000003")
        log.close()
        wait(lambda: "checkpoint_00000003" in page(job))
    assert not job.run.exists(SAMPLES)
    assert chronicler.sample(3) != ""


def test_a_report_that_cannot_be_written_is_said_once(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def fail(*arguments: object) -> str:
        tried.append(arguments)
        raise OSError("no paper")

    monkeypatch.setattr(chronicle_module, "render_report", fail)
    said: list[str] = []
    log = RunLog(job.run, 0)
    with Chronicler(job, {}, said.append) as chronicler:
        for step in range(3):
            log.step(record(step, time=time.time()), board=False)
            wait(lambda step=step: len(tried) > step)  # type: ignore[misc]
    log.close()
    chronicler.close("finished")
    assert said == ["cannot write the report: no paper"]
