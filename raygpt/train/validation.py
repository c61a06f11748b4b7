"""Validation loss on a fixed set, the same number for every W.

The set is the first windows of the validation split, in corpus order, cut into blocks of fixed
shape; worker r computes blocks r, r + W, ...; the blocks' sums are added in block order.
A loss a byte compares models of different tokenizers, which a loss a token does not.
"""

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from raygpt import device as devices
from raygpt.data.corpus import Corpus
from raygpt.data.order import windows_in
from raygpt.data.reader import cut, validation_windows
from raygpt.data.tokenizer import load_tokenizer

BLOCK_TOKENS = 16_384
"""Targets of a block, at least one window; memory, not numbers, sets it, but numbers know it."""


class ValidationLoss(NamedTuple):
    """By their keys in metrics.jsonl."""

    val_loss: float
    """Mean cross entropy, nats a token."""
    val_loss_per_byte: float
    """The same sum over the bytes that the tokens stand for, nats a byte; nan where there are
    none."""


class Validation:
    """This worker's part of the fixed validation set, read once and kept.

    Raises:
        UserError: a shard is missing or damaged.
    """

    def __init__(
        self, corpus: Corpus, block_size: int, tokens: int, rank: int, world_size: int
    ) -> None:
        self._count = validation_windows(corpus, block_size, tokens)
        self._per_block = max(1, BLOCK_TOKENS // block_size)
        self._block_size = block_size
        blocks = range(-(-self._count // self._per_block))
        self._block_count = len(blocks)
        self._mine = {
            block: self._read(corpus, block) for block in blocks if block % world_size == rank
        }
        self._tokenizer = corpus.tokenizer

    @cached_property
    def _bytes(self) -> int:
        """Of this worker's targets; not at the start, since a large vocabulary takes a while."""
        lengths = load_tokenizer(self._tokenizer).byte_lengths()
        return sum(int(lengths[windows[:, 1:]].sum()) for windows in self._mine.values())

    def _read(self, corpus: Corpus, block: int) -> np.ndarray:
        begin = block * self._per_block
        end = min(begin + self._per_block, self._count)
        parts, before = [], 0
        for index, chunk in enumerate(corpus.chunks("val")):
            size = windows_in(chunk.tokens, self._block_size)
            first, last = max(begin - before, 0), min(end - before, size)
            if first < last:
                windows = np.arange(first, last)
                parts.append(cut(corpus.read_chunk("val", index), windows, self._block_size))
            before += size
        return np.concatenate(parts)

    @torch.no_grad()
    def loss(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> ValidationLoss:
        """Every worker calls it and gets the same numbers."""
        sums = torch.zeros(self._block_count + 1, dtype=torch.float64, device=device)
        sums[-1] = self._bytes  # whole numbers, whose sum is exact
        model.eval()
        for block, windows in self._mine.items():
            tokens = devices.put(torch.from_numpy(windows.astype(np.int64)), device)
            with devices.autocast(device, dtype):
                mean = model(tokens[:, :-1], tokens[:, 1:])
            sums[block] = mean.double() * len(windows)
        model.train()
        dist.all_reduce(sums)  # each block has one owner; the others add zero
        *by_block, target_bytes = sums.tolist()
        total = math.fsum(by_block)
        per_byte = total * self._block_size / target_bytes if target_bytes else math.nan
        return ValidationLoss(total / self._count, per_byte)
