"""The numbers that follow from settings and corpus, worked out by hand."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from resolved import change, edit
from resolved import config as config
from resolved import made as made
from resolved import made_gpt2 as made_gpt2
from torch import nn

from raygpt.config import Config
from raygpt.data.corpus import open_corpus
from raygpt.presets import preset
from raygpt.train.job import derived, resolve


def numbers(text: str) -> list[float]:
    """The numbers in a line of the table."""
    found = re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


def test_derived_numbers_of_a_small_run(config: Config) -> None:
    """Worked out by hand.

    Epoch: 930 windows of 16 are 14,880 tokens, 38.75 batches of 384.  A lane gives
    384 / (4 x 16) = 6 windows, two micro-batches of at most 4.  124 steps are 47,616 tokens, 3.2
    epochs.  Parameters: tokens 320 x 32, positions 16 x 32, two layers of 12 x 32 x 32 + 13 x 32,
    last norm 64.
    """
    plain = change(
        config, batch__ramp_tokens=0, batch__ramp_start_tokens=0,
        optim__min_lr=None, optim__decay_tokens=None,
    )  # fmt: skip
    job = resolve(plain)
    rows = derived(job)
    assert rows["run"] == str(job.run)
    assert job.plan.corpus in rows["corpus"] and "bytes" in rows["corpus"]
    assert job.plan.fingerprint[:12] in rows["corpus"]
    assert numbers(rows["training tokens"])[:2] == [14_880, 930]
    assert numbers(rows["validation tokens"]) == [310 * 16]
    assert numbers(rows["parameters"]) == [10_240 + 512 + 2 * 12_704 + 64]
    assert numbers(rows["vocabulary"]) == [320, 257, 63]
    assert numbers(rows["batch"]) == [384]
    assert numbers(rows["lanes"]) == [4, 6, 16]
    assert numbers(rows["accumulation"]) == [2, 4, 8]
    assert numbers(rows["steps"]) == [124, 47_616, 3.2]
    assert numbers(rows["steps per epoch"]) == [38.8]
    assert numbers(rows["learning rate"]) == [6e-4, 3840, 6e-5, 47_616]
    assert numbers(rows["segment"]) == [512]
    assert rows["workers"].startswith("2:4; 1 to 4 are legal")
    # 36,224 parameters of 4 bytes, twice 4 bytes of AdamW; two workers have two lanes each.
    assert rows["weights and optimizer"] == (
        "0.1 MiB + 0.3 MiB + gradients 0.3 MiB (sums of lanes: 2) a worker"
    )


def test_derived_numbers_follow_the_ramp(config: Config) -> None:
    """Worked out by hand: from 2 to 6 windows a lane, one more for every 250 tokens seen.

    A window of each lane is 64 tokens.  Steps have 2, 2, 3, 3, 4, 5 windows, after which 128,
    256, 448, 640, 896 and 1,216 tokens are seen; then 384 tokens each.
    """
    rows = derived(resolve(change(config, train__steps=17)))
    assert numbers(rows["batch"]) == [384, 128, 1000]
    assert numbers(rows["steps"]) == [17, 1216 + 11 * 384, 0.37]
    assert numbers(rows["lanes"]) == [4, 6, 16]
    assert numbers(rows["learning rate"]) == [6e-4, 3840, 1e-4, 30_000]
    by_default = derived(resolve(change(config, train__steps=17, optim__decay_tokens=None)))
    assert numbers(by_default["learning rate"])[3] == 1216 + 11 * 384


@pytest.mark.parametrize(
    ("micro", "expected"), [(1, [6, 1, 24]), (3, [2, 3, 8]), (6, [1, 6, 4]), (16, [1, 6, 4])]
)
def test_accumulation(config: Config, micro: int, expected: list[float]) -> None:
    assert numbers(derived(resolve(change(config, batch__micro=micro)))["accumulation"]) == expected


def test_dropped_tokens_are_those_in_no_window(config: Config, made: Path) -> None:
    """15 chunks of 1,000 tokens, of which 62 windows hold 62 x 16 + 1; and one token alone."""
    job = resolve(config)
    assert job.dropped_tokens == 15 * (1000 - 62 * 16 - 1) + 1
    assert numbers(derived(job)["training tokens"])[2] == job.dropped_tokens


def test_derived_numbers_of_gpt2_on_the_embedded_text(tmp_path: Path) -> None:
    """124.48 million parameters at a vocabulary of 50,304; so short a text fills no larger batch.

    Of its 338,025 tokens a tenth is for validation.
    """
    job = resolve(
        change(
            preset("gpt2"), data__corpus="embedded", run__storage=str(tmp_path),
            batch__tokens=131_072,
        )
    )  # fmt: skip
    assert (job.tokenizer, job.n_vocab, job.token_bytes) == ("gpt2", 50_257, 2)
    rows = derived(job)
    assert numbers(rows["parameters"]) == [124_475_904]
    assert numbers(rows["vocabulary"]) == [50_304, 50_257, 47]
    assert numbers(rows["lanes"]) == [32, 4, 1024]
    assert numbers(rows["accumulation"]) == [1, 4, 32]
    assert numbers(rows["weights and optimizer"]) == [474.8, 949.7, 2.78, 6]
    corpus = open_corpus(job.plan.corpus)
    assert corpus.tokens("train") + corpus.tokens("val") == 338_025 + 2
    assert corpus.tokens("val") == pytest.approx(33_803, abs=2)


@pytest.fixture
def large_corpus(made_gpt2: Path, tmp_path: Path) -> str:
    """The manifest of 300 chunks of 512 windows of 2,048 tokens; nobody reads their shard."""
    path = Path(shutil.copytree(made_gpt2, tmp_path / "large"))
    tokens = 512 * 2048 + 1

    def enlarge(manifest: dict[str, Any]) -> None:
        train = manifest["splits"]["train"]
        train["shards"][0]["chunks"] = [
            {"row_group": i, "tokens": tokens, "sha256": ""} for i in range(300)
        ]
        train["tokens"] = 300 * tokens

    edit(path, enlarge)
    return str(path)


def test_gpt2_accumulates_as_published(large_corpus: str) -> None:
    """524,288 tokens in micro-batches of 16 x 1,024 are 32, whatever the lanes."""
    job = resolve(change(preset("gpt2"), data__corpus=large_corpus, train__eval_tokens=0))
    assert numbers(derived(job)["accumulation"]) == [1, 16, 32]
    one_lane = change(job.config, batch__lanes=1)
    assert numbers(derived(resolve(one_lane))["accumulation"]) == [32, 16, 32]


def test_gpt3_175b_can_be_planned(large_corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its 650 GiB of weights: no module is made."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    job = resolve(change(preset("gpt3-175b"), data__corpus=large_corpus, train__eval_tokens=0))
    rows = derived(job)
    C = 12_288
    assert numbers(rows["parameters"]) == [
        (50_304 + 2048) * C + 96 * (12 * C * C + 13 * C) + 2 * C
    ] == [174_604_836_864]  # fmt: skip
    assert numbers(rows["weights and optimizer"]) == [650.45, 1300.91, 3252.27, 5]
    assert numbers(rows["training tokens"])[:2] == [314_572_800, 153_600]
    assert numbers(rows["steps per epoch"]) == [100.0]  # 314,572,800 / 3,145,728
    assert numbers(rows["accumulation"]) == [96, 1, 1536]
    assert numbers(rows["batch"]) == [3_145_728, 32_768, 12e9]
    steps, tokens, epochs = numbers(rows["steps"])
    assert steps == job.config.train.steps and 300e9 <= tokens < 300e9 + 3_145_728
    assert epochs == pytest.approx(tokens / 314_572_800, abs=0.006)
    assert rows["workers"].endswith("1 to 16 are legal, all give the same model")
