"""Losses of a small run, recorded: whoever changes a number, knowingly or not, sees it here.

Bit for bit where torch, threads and processor are those of a record, else within 1e-5.
``python tests/test_recorded.py`` records this machine's.
"""

import json
import platform
import re
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers import on_workers
from torch.nn.parallel import DistributedDataParallel

from raygpt.config import ModelConfig, OptimConfig
from raygpt.data.corpus import open_corpus
from raygpt.data.order import Segments
from raygpt.data.prepare import prepare
from raygpt.data.reader import ReadPlan, WindowReader
from raygpt.data.stream import lane_steps
from raygpt.device import cpu_kind
from raygpt.model import GPT
from raygpt.optim import build_optimizer, lr_at
from raygpt.train.step import Stepper

RECORDS = Path(__file__).parent / "recorded"
STEPS, LANES, THREADS, SEED = 50, 4, 1, 1337
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=320, dropout=0.1)


def train(corpus: str) -> list[float]:
    """Losses and norms of 50 steps with accumulation, ramp, clipping and dropout, fp32."""
    opened = open_corpus(corpus)
    plan = ReadPlan(corpus, opened.fingerprint, SEED, LANES, MODEL.block_size, 4, 1, 10_000)
    reader, segments = WindowReader(plan), Segments(0, STEPS, STEPS, LANES)
    torch.manual_seed(SEED)
    model = GPT(MODEL, opened.n_vocab)
    optimizer = build_optimizer(model, OptimConfig())
    stepper = Stepper(
        model,
        DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False),
        optimizer,
        lanes=LANES,
        micro=3,
        grad_clip=1.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=SEED,
    )
    found: list[float] = []
    for batch in lane_steps(reader, segments, 0, 1, iter(())):
        seen, tokens = (
            f(batch.step) for f in (reader.schedule.tokens_before, reader.schedule.tokens)
        )
        lr = lr_at(seen, tokens, max_lr=1e-3, min_lr=1e-4, warmup_tokens=3000, decay_tokens=25_000)
        result = stepper.gradient(batch, (0,) * LANES)
        stepper.update(result, lr)
        found += [result.loss, result.grad_norm]
    return found


def record() -> list[float]:
    """What this machine computes, on the first 100,000 bytes of the embedded text."""
    text = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()[:100_000]
    with TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_bytes(text)
        corpus = f"{folder}/corpus"
        prepare([f"{folder}/text.txt"], corpus, "bytes", val_fraction=0.1, on_ray=False)
        (found,) = on_workers(1, train, corpus)
    return list(found)


def record_name() -> str:
    """Names what the last bits depend on: torch, threads, vendor, instruction set, CPU model."""
    cpu = dict(
        re.findall(r"^(cpu family|model)\s*: (\d+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if platform.system() == "Linux"
        else []
    )
    model = "".join(f"-{key.split()[-1]}{value}" for key, value in sorted(cpu.items()))
    version = torch.__version__.partition("+")[0]
    return f"losses-torch{version}-threads{THREADS}-{cpu_kind()}{model}.json"


def test_losses_are_the_recorded_ones() -> None:
    records = sorted(RECORDS.glob("losses-*.json"))
    assert records
    found = record()
    assert found[0] == pytest.approx(5.55, abs=0.1)  # ln 257
    assert found[-2] < found[0] - 1.5
    mine = RECORDS / record_name()
    for path in records:
        expected = json.loads(path.read_text())
        if path == mine:
            assert found == expected
        else:
            assert found == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    path = RECORDS / record_name()
    path.write_text(json.dumps(record(), indent=0) + "\n")
    print(f"recorded {path}")
