"""A small corpus, a run on it with every schedule given, and other settings for it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from raygpt.config import BatchConfig, Config, ModelConfig, OptimConfig, RunConfig, TrainConfig
from raygpt.data.corpus import MANIFEST
from raygpt.data.prepare import prepare
from raygpt.errors import UserError
from raygpt.values import from_dict

TEXT = (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_bytes()
CHUNK = 1000
# As bytes, 15,001 tokens are for training: 15 chunks of 62 windows of 16, then one token alone;
# 5,001 are for validation: 5 such chunks, then one token alone.
TRAIN_WINDOWS, VAL_WINDOWS = 15 * 62, 5 * 62


def make_corpus(folder: Path, tokenizer: str = "bytes", val_fraction: float = 0.25) -> Path:
    folder.mkdir()
    (folder / "text.txt").write_bytes(TEXT[:20_000])
    output = str(folder / "corpus")
    prepare(
        [str(folder / "text.txt")], output, tokenizer, val_fraction=val_fraction,
        chunk_tokens=CHUNK, on_ray=False,
    )  # fmt: skip
    return folder / "corpus"


# Fixtures; a test file imports them under their own names: ``from resolved import path as path``.
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes, not to be changed."""
    return make_corpus(tmp_path_factory.mktemp("made") / "bytes")


@pytest.fixture(scope="module")
def made_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text as GPT-2's tokens, not to be changed."""
    return make_corpus(tmp_path_factory.mktemp("made") / "gpt2", "gpt2")


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    """A copy of the corpus, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Config:
    """A run with every schedule given, so that a change of one setting changes no other."""
    return Config(
        run=RunConfig("first", str(tmp_path / "runs")),
        data=replace(Config().data, corpus=str(made)),
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=320),
        batch=BatchConfig(384, lanes=4, micro=4, ramp_start_tokens=128, ramp_tokens=1000),
        optim=OptimConfig(min_lr=1e-4, warmup_steps=10, decay_tokens=30_000),
        train=TrainConfig(steps=124),
        scale=replace(Config().scale, workers="2:4"),
    )


def change(config: Config, **settings: Any) -> Config:
    """``config`` with other settings, named ``section__field``."""
    values: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return from_dict(values, config)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert message and "\n" not in message
    return message


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
