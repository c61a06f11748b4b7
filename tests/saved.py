"""A run of a tiny model, trained by hand, and its checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raygpt.config import Config, ModelConfig, OptimConfig
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.storage import Folder
from raygpt.train.checkpoints import (
    PASSED_OVER,
    Checkpoint,
    DamagedCheckpoint,
    Position,
    checkpoint_name,
    latest,
)
from raygpt.train.state import save, verify
from raygpt.values import to_dict

CONFIG = Config(
    model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=264),
    batch=replace(Config().batch, tokens=64, lanes=1),
)
N_VOCAB = 257
SETTINGS: dict[str, Any] = {
    "settings": to_dict(CONFIG),
    "corpus": {"tokenizer": "bytes", "n_vocab": N_VOCAB},
}


class Run:
    """A tiny model in training, and its run folder."""

    def __init__(
        self, folder: Path | str, config: ModelConfig = CONFIG.model, seed: int = 1
    ) -> None:
        self.path, self.folder = Path(folder), Folder.from_path(str(folder))
        torch.manual_seed(seed)
        self.model = GPT(config, N_VOCAB)
        self.optimizer = build_optimizer(self.model, OptimConfig())

    def train(self, steps: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            tokens = torch.randint(0, N_VOCAB, (2, 9), generator=generator)
            self.optimizer.zero_grad()
            self.model(tokens[:, :-1], tokens[:, 1:]).backward()
            self.optimizer.step()

    def save(self, step: int, val_loss: float | None = None) -> Checkpoint:
        position = Position(step=step, tokens=64 * step, skipped=1, val_loss=val_loss)
        return save(self.folder, position, self.model, self.optimizer, SETTINGS)

    def file(self, step: int, name: str) -> Path:
        return self.path / checkpoint_name(step) / name

    def weights(self) -> list[bytes]:
        return [p.detach().numpy().tobytes() for p in self.model.parameters()]

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint that would be used, and what is said about it; as workers find it."""
        said: list[str] = []
        damaged: set[int] = set()
        while True:
            found = latest(self.folder, said.append, damaged)
            try:
                if found is not None:
                    verify(found)
                return found, said
            except DamagedCheckpoint as error:
                assert found is not None
                damaged.add(found.position.step)
                said.append(f"{error}; {PASSED_OVER}")


# A fixture; a test file imports it under its own name: ``from saved import run as run``.
@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
