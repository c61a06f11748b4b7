"""Validation: one number for every W, over a fixed set of windows, without dropout."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import on_workers
from torch import nn

from raygpt.config import ModelConfig
from raygpt.data.corpus import Corpus, open_corpus
from raygpt.data.prepare import prepare
from raygpt.data.reader import validation_windows
from raygpt.data.tokenizer import Tokenizer, load_tokenizer
from raygpt.model import GPT
from raygpt.train import validation
from raygpt.train.validation import Validation, ValidationLoss

T = 16
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=264)
N_VOCAB = 257
BLOCK_WINDOWS = 90
"""Of a block in these tests; small, so that there are several and chunks end inside of them."""
LIMIT = 2 * BLOCK_WINDOWS * T
CPU = torch.device("cpu")


def build(dropout: float = 0.0) -> GPT:
    """A model whose loss differs much from window to window, so that each window counts."""
    torch.manual_seed(3)
    model = GPT(replace(MODEL, dropout=dropout), N_VOCAB)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10.0)
    return model


def all_windows(corpus: Corpus) -> list[np.ndarray]:
    """Every validation window in corpus order, by the definition: T + 1 tokens of one chunk."""
    found = []
    for index in range(len(corpus.chunks("val"))):
        tokens = corpus.read_chunk("val", index)
        starts = range(0, len(tokens) - T, T)
        found += [tokens[start : start + T + 1].astype(np.int64) for start in starts]
    return found


def plain_loss(windows: list[np.ndarray]) -> float:
    """Mean cross entropy over the windows, one after the other, without blocks or workers."""
    model = build()
    losses = []
    with torch.no_grad():
        for window in windows:
            tokens = torch.from_numpy(window)
            logits = model(tokens[None, :-1])[0]
            losses.append(F.cross_entropy(logits, tokens[1:]).double().item())
    return math.fsum(losses) / len(losses)


def worker_losses(corpus: Corpus) -> tuple[ValidationLoss, ValidationLoss]:
    """On each worker: the loss of the whole set and of a limited one.

    The limited set has fewer blocks than three workers: one of them has none.
    """
    validation.BLOCK_TOKENS = BLOCK_WINDOWS * T
    model = build()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole, limited = (
        Validation(corpus, T, tokens, rank, world_size).loss(model, CPU, torch.float32)
        for tokens in (10**9, LIMIT)
    )
    return whole, limited


@pytest.fixture(scope="module")
def one_worker(tiny_corpus: Corpus) -> tuple[ValidationLoss, ValidationLoss]:
    (result,) = on_workers(1, worker_losses, tiny_corpus)
    return result


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This process as the only worker, with blocks as small as the workers' of these tests."""
    monkeypatch.setattr(validation, "BLOCK_TOKENS", BLOCK_WINDOWS * T)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Watcher(nn.Module):
    """Takes the place of the model: keeps what it is asked, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[torch.Tensor] = []
        self.modes: set[tuple[bool, bool]] = set()
        """(training, gradients are recorded)"""

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert torch.equal(idx[:, 1:], targets[:, :-1])
        self.batches.append(torch.cat([idx, targets[:, -1:]], dim=1))
        self.modes.add((self.training, torch.is_grad_enabled()))
        return targets.float().mean()

    @property
    def windows(self) -> list[list[int]]:
        return torch.cat(self.batches).tolist()


def test_the_corpus_makes_it_hard(tiny_corpus: Corpus) -> None:
    """Several chunks, several blocks, a shorter last one; the model tells windows apart."""
    windows = all_windows(tiny_corpus)
    assert len(tiny_corpus.chunks("val")) > 2
    assert len(windows) > 3 * BLOCK_WINDOWS and len(windows) % BLOCK_WINDOWS
    whole = plain_loss(windows)
    assert abs(whole - plain_loss(windows[: LIMIT // T])) > 1e-3
    assert abs(whole - plain_loss(windows[:-1])) > 1e-5
    assert abs(whole - plain_loss([*windows, windows[-1]])) > 1e-5


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_loss_is_the_same_bits_for_every_number_of_workers(
    world_size: int, one_worker: tuple[ValidationLoss, ValidationLoss], tiny_corpus: Corpus
) -> None:
    assert on_workers(world_size, worker_losses, tiny_corpus) == [one_worker] * world_size


def test_the_loss_is_that_of_a_plain_loop(
    one_worker: tuple[ValidationLoss, ValidationLoss], tiny_corpus: Corpus
) -> None:
    whole, limited = one_worker
    windows = all_windows(tiny_corpus)
    assert whole.val_loss == pytest.approx(plain_loss(windows), abs=1e-6, rel=0)
    assert limited.val_loss == pytest.approx(plain_loss(windows[: LIMIT // T]), abs=1e-6, rel=0)


@pytest.mark.parametrize(
    ("tokens", "count"), [(0, 0), (1, 1), (T, 1), (40 * T, 40), (BLOCK_WINDOWS * T, BLOCK_WINDOWS)]
)
def test_the_split_is_cut_to_eval_tokens(tiny_corpus: Corpus, tokens: int, count: int) -> None:
    assert validation_windows(tiny_corpus, T, tokens) == count


def test_eval_tokens_may_be_more_than_there_are(tiny_corpus: Corpus) -> None:
    count = len(all_windows(tiny_corpus))
    for tokens in (count * T, (count + 1) * T, 10**12):
        assert validation_windows(tiny_corpus, T, tokens) == count
    assert validation_windows(tiny_corpus, T, (count - 1) * T) == count - 1
    longest = max(chunk.tokens for chunk in tiny_corpus.chunks("val"))
    assert validation_windows(tiny_corpus, longest, 10**12) == 0
    assert validation_windows(tiny_corpus, longest - 1, 10**12) > 0


def worker_losses_of_words(corpus: Corpus) -> ValidationLoss:
    validation.BLOCK_TOKENS = BLOCK_WINDOWS * T
    torch.manual_seed(3)
    model = GPT(replace(MODEL, vocab_size=512), 512)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Validation(corpus, T, 10**9, rank, world_size).loss(model, CPU, torch.float32)


def test_bytes_are_those_of_the_targets(tmp_path: Path) -> None:
    """By the definition: the text that they stand for, in which end-of-text has no part."""
    for number, text in enumerate(["To be, or not to be. ", "naïve\n"]):
        (tmp_path / f"{number}.txt").write_text(text * 100 * (number + 1))
    paths = [str(tmp_path / f"{number}.txt") for number in range(2)]
    prepare(paths, str(tmp_path / "corpus"), "gpt2-512", val_fraction=0.5, on_ray=False)
    corpus, tokenizer = open_corpus(str(tmp_path / "corpus")), load_tokenizer("gpt2-512")
    targets = [token for window in all_windows(corpus) for token in window[1:].tolist()]
    text = tokenizer.decode([token for token in targets if token != tokenizer.eot])
    first, other = (on_workers(workers, worker_losses_of_words, corpus)[-1] for workers in (1, 3))
    assert first == other
    nats = first.val_loss * len(targets)
    assert first.val_loss_per_byte == pytest.approx(nats / len(text.encode()), rel=1e-12)


def test_a_set_without_bytes_has_no_loss_a_byte(
    tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda sums: None)
    nothing = np.zeros(N_VOCAB, np.int64)
    monkeypatch.setattr(Tokenizer, "byte_lengths", lambda _: nothing)
    loss = Validation(tiny_corpus, T, LIMIT, 0, 1).loss(Watcher(), CPU, torch.float32)
    assert loss.val_loss > 0 and math.isnan(loss.val_loss_per_byte)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("count", [1, BLOCK_WINDOWS, BLOCK_WINDOWS + 1, 255, 256, None])
def test_the_set_is_the_first_windows_of_the_split(tiny_corpus: Corpus, count: int | None) -> None:
    """In corpus order, whatever has been drawn at random and however often it is asked."""
    expected = [window.tolist() for window in all_windows(tiny_corpus)[:count]]
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        validator = Validation(tiny_corpus, T, len(expected) * T, 0, 1)
        for _ in range(2):
            watcher = Watcher()
            validator.loss(watcher, CPU, torch.float32)
            assert watcher.windows == expected
            assert max(len(batch) for batch in watcher.batches) <= BLOCK_WINDOWS


def test_workers_share_the_set_between_them(
    tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No window is computed twice, none left out, and the blocks do not depend on W."""
    monkeypatch.setattr(validation, "BLOCK_TOKENS", BLOCK_WINDOWS * T)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: None)
    expected = [window.tolist() for window in all_windows(tiny_corpus)]
    blocks = [expected[i : i + BLOCK_WINDOWS] for i in range(0, len(expected), BLOCK_WINDOWS)]
    for world_size in (1, 2, 3, len(blocks) + 1):
        computed = []
        for rank in range(world_size):
            watcher = Watcher()
            Validation(tiny_corpus, T, 10**9, rank, world_size).loss(watcher, CPU, torch.float32)
            assert len(watcher.batches) <= -(-len(blocks) // world_size)
            computed += [batch.tolist() for batch in watcher.batches]
        assert sorted(computed) == sorted(blocks)


@pytest.mark.usefixtures("alone")
def test_dropout_is_off_and_training_goes_on(tiny_corpus: Corpus) -> None:
    validator = Validation(tiny_corpus, T, LIMIT, 0, 1)
    model = build(dropout=0.5)
    model.train()
    tokens = torch.from_numpy(np.stack(all_windows(tiny_corpus)[:2]))
    first, second = (model(tokens[:, :-1], tokens[:, 1:]).item() for _ in range(2))
    assert first != second
    loss = validator.loss(model, CPU, torch.float32)
    assert loss == validator.loss(build(dropout=0.0), CPU, torch.float32)
    assert all(module.training for module in model.modules())

    watcher = Watcher().train()
    validator.loss(watcher, CPU, torch.float32)
    assert watcher.modes == {(False, False)} and watcher.training
