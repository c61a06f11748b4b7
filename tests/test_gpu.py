"""What only a GPU can show; without one nothing here runs."""

import gzip
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_step
import torch
import torch.nn.functional as F
from head import ROOT
from helpers import OPTIMIZER_FILE, TRAINED, WEIGHTS_FILE, on_workers
from test_step import LANES, LR, SEED, SEGMENTS, windows
from troubled import EVERY, SETTINGS, finish, wait_for
from troubled import STEPS as JOB_STEPS

from raygpt import device as devices
from raygpt.config import OptimConfig
from raygpt.data.stream import StepWindows
from raygpt.loss import linear_cross_entropy
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.peak import peak_flops_of
from raygpt.runs.files import EVENTS, METRICS, read_json_lines
from raygpt.storage import Folder
from raygpt.train import reduce
from raygpt.train.checkpoints import Position, checkpoint_name, latest
from raygpt.train.profile import PARTS, Profiler
from raygpt.train.saver import Saver
from raygpt.train.state import save
from raygpt.train.step import Stepper

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
    pytest.mark.xdist_group("gpu"),
]
GPU = torch.device("cuda", 0)
MODEL, MODERN = (
    replace(model, n_embd=64, vocab_size=128) for model in (test_step.MODEL, test_step.MODERN)
)
STEPS = range(SEGMENTS.start, SEGMENTS.stop)


class Worker:
    """One worker with a small model in bf16."""

    def __init__(
        self,
        modern: bool = False,
        twice: bool = False,
        compiled: bool = False,
        profiler: Profiler | None = None,
    ) -> None:
        torch.cuda.set_device(GPU)
        devices.set_up(GPU, threads=1, exact=True)
        torch.manual_seed(SEED)
        self.model = GPT(MODERN if modern else MODEL, 65).to(GPU)
        self.optimizer = build_optimizer(
            self.model, OptimConfig(matrices="muon" if modern else "adamw")
        )
        if twice:
            self.model.checkpoint_activations()
        if compiled:
            self.model.compile_layers(**devices.compile_options(GPU, exact=True))
        self.stepper = Stepper(
            self.model, reduce.data_parallel(self.model), self.optimizer, lanes=LANES, micro=2,
            grad_clip=0.5, device=GPU, dtype=torch.bfloat16, seed=SEED,
            **({} if profiler is None else {"part": profiler.part}),
        )  # fmt: skip

    def gradient(self, step: int) -> Any:
        lanes = {lane: windows(step, lane) for lane in range(LANES)}
        segment = SEGMENTS.of_step(step)
        return self.stepper.gradient(StepWindows(step, segment, lanes), (0,) * LANES)

    def train(self, step: int) -> tuple[float, float]:
        result = self.gradient(step)
        self.stepper.update(result, LR)
        return result.loss, result.grad_norm

    def weights(self) -> list[bytes]:
        return [p.detach().cpu().numpy().tobytes() for p in self.model.parameters()]


def train(
    modern: bool = False, twice: bool = False, compiled: bool = False
) -> tuple[list[tuple[float, float]], list[bytes]]:
    worker = Worker(modern, twice, compiled)
    return [worker.train(step) for step in STEPS], worker.weights()


def train_compiled(cache: Path) -> tuple[list[tuple[float, float]], list[bytes]]:
    """With nothing compiled before."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    return train(compiled=True)


def on_gpu(function: Any, *args: Any) -> Any:
    """What a function returns in a process of its own, alone in its group."""
    return on_workers(1, function, *args, backend="nccl")[0]


@pytest.mark.parametrize("modern", [False, True], ids=["gpt2", "modern"])
def test_exact_steps_have_the_same_bits_again(modern: bool) -> None:
    """Also where layers are computed twice, with the same dropout."""
    losses, weights = on_gpu(train, modern)
    assert on_gpu(train, modern) == (losses, weights)
    assert on_gpu(train, modern, True) == (losses, weights)


def test_compiled_layers_have_the_same_bits_wherever_they_are_compiled(tmp_path: Path) -> None:
    compiled = on_gpu(train_compiled, tmp_path / "one")
    assert on_gpu(train_compiled, tmp_path / "two") == compiled
    plain = on_gpu(train)
    for (loss, norm), (other, other_norm) in zip(plain[0], compiled[0], strict=True):
        # dropout draws other numbers in compiled kernels
        assert loss == pytest.approx(other, rel=0.05)
        assert norm == pytest.approx(other_norm, rel=0.5)


def test_a_gradient_is_that_of_a_cpu() -> None:
    """Without dropout and TF32; some tokens come up many times."""
    torch.manual_seed(SEED)
    tokens = torch.randint(0, 65, (64, MODEL.block_size + 1)) ** 2 // 65
    before, results = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision("highest")
    for device in (GPU, torch.device("cpu")):
        torch.manual_seed(SEED)
        model = GPT(replace(MODEL, dropout=0.0), 65)
        here = tokens.to(device)
        loss = model.to(device)(here[:, :-1], here[:, 1:])
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None for g in gradients)
        results.append((loss.item(), [g.cpu() for g in gradients if g is not None]))
    torch.set_float32_matmul_precision(before)
    (loss, mine), (cpu_loss, theirs) = results
    assert loss == pytest.approx(cpu_loss, rel=1e-5)
    for gradient, expected in zip(mine, theirs, strict=True):
        assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def count_waits() -> list[int]:
    """Of some steps, how often they waited for the device."""
    worker, counts = Worker(), []
    worker.train(STEPS[0])
    worker.train(STEPS[1])
    torch.cuda.set_sync_debug_mode("warn")
    for step in STEPS[2:]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            worker.train(step)
        counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
    torch.cuda.set_sync_debug_mode("default")
    return counts


def test_a_step_waits_for_the_device_once() -> None:
    assert set(on_gpu(count_waits)) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [2**12, 2**29])
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_the_loss_is_that_of_full_logits(
    dtype: torch.dtype, chunk_bytes: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raygpt.loss.CHUNK_BYTES", {"cuda": chunk_bytes})
    monkeypatch.setattr(devices, "has_triton", lambda _: kernel == "triton")
    generator = torch.Generator(GPU).manual_seed(1)
    x = torch.randn(40, 64, device=GPU, generator=generator, requires_grad=True)
    head = torch.randn(104, 64, device=GPU, generator=generator).mul_(0.1).requires_grad_()
    targets = torch.randint(0, 100, (40,), device=GPU, generator=generator)
    with devices.autocast(GPU, dtype):
        loss = linear_cross_entropy(x, head, targets, 100)
    loss.backward()
    ours = [loss.detach(), x.grad, head.grad]
    x.grad = head.grad = None
    logits = (x.double() @ head.double().t())[:, :100]
    full = F.cross_entropy(logits, targets)
    full.backward()
    near = 1e-2 if dtype == torch.bfloat16 else 2e-3  # TF32 may multiply fp32
    for mine, exact in zip(ours, [full.detach(), x.grad, head.grad], strict=True):
        assert mine is not None and exact is not None
        error = (mine.double() - exact).norm() / exact.norm()
        assert error.item() < near


def checkpoint_beside_training(path: Path) -> None:
    """A checkpoint that is written while the weights change, and the same state saved at rest."""
    worker, run = Worker(), Folder.from_path(str(path))
    for step in STEPS[:2]:
        worker.train(step)
    saver = Saver(run, {}, None, GPU, 30.0, print, lambda *_: None)
    position = Position(step=2)
    save(run.child("rest"), position, worker.model, worker.optimizer, {})
    saver.begin(position, worker.model, worker.optimizer)
    for step in STEPS[2:]:
        result = worker.gradient(step)
        saver.wait_for_copy()
        worker.stepper.update(result, LR)
    saver.wait()
    save(run.child("later"), position, worker.model, worker.optimizer, {})


def test_a_checkpoint_beside_training_is_that_of_its_step(tmp_path: Path) -> None:
    on_gpu(checkpoint_beside_training, tmp_path)
    name = checkpoint_name(2)
    for file in (WEIGHTS_FILE, OPTIMIZER_FILE):
        rest = (tmp_path / "rest" / name / file).read_bytes()
        assert (tmp_path / name / file).read_bytes() == rest
        assert (tmp_path / "later" / name / file).read_bytes() != rest


def profiled(path: Path) -> None:
    """Some steps, of which two are profiled."""
    profiler = Profiler(f"{STEPS[2]}:{STEPS[4]}", GPU, Folder.from_path(str(path)), 0.0, print)
    worker = Worker(profiler=profiler)
    for step in STEPS:
        with profiler.step(step):
            with profiler.part("data"):
                pass
            result = worker.gradient(step)
            with profiler.part("update"):
                worker.stepper.update(result, LR)


def test_a_profile_shows_kernels_and_parts_within_the_step(tmp_path: Path) -> None:
    on_gpu(profiled, tmp_path)
    (trace,) = (tmp_path / "profile").glob("*.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    (table,) = (tmp_path / "profile").glob("*.md")
    rows = dict(re.findall(r"\| (\w+) \| ([\d.]+) \(", table.read_text()))
    assert all(float(rows[part]) > 0 for part in PARTS)
    assert float(rows["rest"]) >= 0, "what is left of the step"


def start(storage: Path, name: str) -> "subprocess.Popen[str]":
    """A real job on a Ray of its own."""
    settings = storage / "run.yaml"
    text = SETTINGS.replace("STORAGE", str(storage)).replace("CORPUS", "embedded")
    text = text.replace("{workers: 2, gpus_per_worker: 0}", "{workers: 1, gpus_per_worker: 1}")
    settings.write_text(text.replace("precision: fp32", "precision: auto, exact: true"))
    command = (sys.executable, "jobs/train.py", "--config", str(settings), "--run.name", name)
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_killed_worker_costs_no_bit(tmp_path: Path) -> None:
    """With NCCL, bf16 and dropout."""
    finish(start(tmp_path, "quiet"))
    process = start(tmp_path, "killed")
    quiet, killed = (Folder.from_path(str(tmp_path)).child(name) for name in ("quiet", "killed"))
    wait_for(process, lambda: len(read_json_lines(killed, METRICS)) > EVERY + EVERY // 2)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name().startswith("ray::RayTrainWorker"):
            child.kill()
    finish(process)
    results = []
    for run, attempts in ((quiet, 1), (killed, 2)):
        found = latest(run)
        assert found is not None and found.position.step == JOB_STEPS
        starts = [event for event in read_json_lines(run, EVENTS) if event["kind"] == "start"]
        assert len(starts) == attempts
        name = torch.cuda.get_device_name(GPU)
        assert all(name in event["text"] and "bfloat16" in event["text"] for event in starts)
        rows = read_json_lines(run, METRICS)
        if peak_flops_of(name, torch.bfloat16) is not None:
            assert all(0 < row["mfu"] < 1 for row in rows)
        trained = [{key: row.get(key) for key in TRAINED} for row in rows]
        results.append((found.weights_sha256, trained))
    assert results[0] == results[1]
