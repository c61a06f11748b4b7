"""A run, resolved: wrong inputs are told in one line, derived numbers are right, and a run goes on
only as the run it was."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from raygpt.config import (
    BatchConfig,
    Config,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    setting_names,
    to_dict,
)
from raygpt.data.corpus import MANIFEST, open_corpus
from raygpt.data.prepare import prepare
from raygpt.errors import UserError
from raygpt.presets import preset
from raygpt.train.job import Job, check_identity, derived, resolve, with_absolute_storage

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


def shard(path: Path, split: str = "train") -> Path:
    return next(path.glob(f"{split}-*.parquet"))


# --- wrong inputs


def test_a_good_configuration_is_resolved(config: Config, made: Path) -> None:
    job = resolve(config)
    assert job.plan.corpus == job.val_corpus == str(made)
    assert (job.epoch_windows, job.val_windows) == (TRAIN_WINDOWS, VAL_WINDOWS)
    assert (job.tokenizer, job.n_vocab, job.token_bytes) == ("bytes", 257, 2)
    assert pickle.loads(pickle.dumps(job)) == job  # every worker gets it


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"data__corpus": ""}, ["data.corpus", "--data.corpus", "embedded"]),
        ({"data__corpus": "{tmp}/none"}, ["corpus {tmp}/none does not exist"]),
        ({"data__val_corpus": "{tmp}/none"}, ["corpus {tmp}/none does not exist"]),
        ({"data__val_corpus": "{gpt2}"}, ["data.val_corpus {gpt2}", "'gpt2'", "'bytes'"]),
        # 930 windows, of which a batch takes 4 x 233.
        (
            {"batch__tokens": 4 * 16 * 233},
            ["{made}", "930", "932", "batch.tokens", "model.block_size"],
        ),
        ({"batch__lanes": 16, "batch__tokens": 256, "batch__ramp_start_tokens": 256},
         ["15 chunks", "batch.lanes 16"]),
        ({"model__block_size": 1000, "batch__tokens": 4000, "batch__ramp_start_tokens": 4000},
         ["0 chunks", "batch.lanes 4", "model.block_size"]),
        ({"model__vocab_size": 256}, ["model.vocab_size 256", "{made}", "257"]),
        ({"model__vocab_size": 1025}, ["model.vocab_size 1025", "{made}", "257", "320"]),
        ({"data__corpus": "{gpt2}"}, ["model.vocab_size 320", "{gpt2}", "50257", "50304"]),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_is_named(
    config: Config, made: Path, made_gpt2: Path, tmp_path: Path,
    settings: dict[str, Any], names: list[str],
) -> None:  # fmt: skip
    def full(text: Any) -> Any:
        places = {"tmp": tmp_path, "made": made, "gpt2": made_gpt2}
        return text.format_map(places) if isinstance(text, str) else text

    wrong = change(config, **{name: full(value) for name, value in settings.items()})
    message = refused(lambda: resolve(wrong))
    for name in names:
        assert full(name) in message


@pytest.mark.parametrize(
    "settings",
    [
        # A batch of all 930 windows.
        {"batch__lanes": 2, "batch__tokens": 2 * 16 * 465, "scale__workers": "1"},
        {"batch__lanes": 8, "batch__tokens": 256},  # of 15 chunks
        {"model__vocab_size": 257},
        {"model__vocab_size": 1024},
    ],
)
def test_what_just_fits_is_accepted(config: Config, settings: dict[str, Any]) -> None:
    resolve(change(config, **settings))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("setting", ["data__corpus", "data__val_corpus"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [(cut, "is damaged: it has"), (lengthen, "is damaged: it has"), (Path.unlink, "is missing")],
)
def test_a_damaged_shard_is_named(
    config: Config, path: Path, setting: str, split: str,
    damage: Callable[[Path], object], said: str,
) -> None:  # fmt: skip
    """Of both corpora, before anything is read."""
    other = change(config, **{setting: str(path)})
    resolve(other)
    damage(shard(path, split))
    assert f"{path}/{split}-00000.parquet {said}" in refused(lambda: resolve(other))


@pytest.mark.parametrize("setting", ["data__corpus", "data__val_corpus"])
def test_a_corpus_that_was_not_finished_is_named(config: Config, path: Path, setting: str) -> None:
    (path / MANIFEST).unlink()
    other = change(config, **{setting: str(path)})
    assert refused(lambda: resolve(other)).startswith(f"{path} has no {MANIFEST}")
    (path / MANIFEST).write_text("{")
    assert f"{path}/{MANIFEST} is damaged" in refused(lambda: resolve(other))


def test_a_tokenizer_that_has_changed_is_named(config: Config, path: Path) -> None:
    edit(path, lambda manifest: manifest["tokenizer"].update(hash="0" * 64))
    message = refused(lambda: resolve(change(config, data__corpus=str(path))))
    assert f"corpus {path} was made with another tokenizer 'bytes'" in message


def test_a_split_without_a_validation_window_is_named(config: Config, tmp_path: Path) -> None:
    short = make_corpus(tmp_path / "short", val_fraction=0.0005)  # 10 tokens and end-of-text
    other = change(config, data__corpus=str(short))
    message = refused(lambda: resolve(other))
    assert f"corpus {short} has no validation window of 16 tokens" in message
    for way_out in ("--val-fraction", "data.val_corpus", "train.eval_tokens 0"):
        assert way_out in message
    assert resolve(change(other, train__eval_tokens=0)).val_windows == 0
    assert resolve(change(other, data__val_corpus=config.data.corpus)).val_windows == VAL_WINDOWS
    assert resolve(change(config, data__val_corpus=config.data.corpus)).val_windows == VAL_WINDOWS
    # The split of data.corpus would do, but it is not the one that is asked for.
    message = refused(lambda: resolve(change(config, data__val_corpus=str(short))))
    assert f"corpus {short} has no validation window" in message


def test_paths_do_not_depend_on_the_working_directory(
    config: Config, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have another one than the driver."""
    monkeypatch.chdir(tmp_path)
    job = resolve(
        change(config, data__corpus="copy", data__val_corpus="copy", run__storage="runs/here")
    )
    monkeypatch.chdir("/")
    assert job.plan.corpus == job.val_corpus == str(path)
    assert str(job.run) == str(tmp_path / "runs" / "here" / "first")


@pytest.mark.parametrize(
    ("cwd", "storage", "expected"),
    [
        ("here", "runs", "{tmp}/here/runs"),
        ("here", "../runs", "{tmp}/runs"),
        ("here", "~/runs", "{tmp}/home/runs"),
        ("here", "{tmp}/runs", "{tmp}/runs"),
        ("here", "s3://bucket/runs", "s3://bucket/runs"),
        ("ray/working_dir_files/job", "runs", "{tmp}/home/runs"),
        ("ray/working_dir_files/job", "{tmp}/runs", "{tmp}/runs"),
        ("ray/working_dir_files/job", "s3://bucket/runs", "s3://bucket/runs"),
    ],
)
def test_storage_outlives_a_submitted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cwd: str, storage: str, expected: str
) -> None:
    """What is relative begins here; but not in a folder that Ray unpacked and will delete."""
    (tmp_path / cwd).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / cwd)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = change(Config(), run__storage=storage.format(tmp=tmp_path))
    assert with_absolute_storage(config).run.storage == expected.format(tmp=tmp_path)


# --- the embedded text


def test_the_embedded_text_is_made_into_a_corpus_once(tmp_path: Path) -> None:
    config = change(
        preset("shakespeare"), run__storage=str(tmp_path),
        model__block_size=512, batch__tokens=2048,
    )  # fmt: skip
    job = resolve(config)
    manifest = Path(job.plan.corpus) / MANIFEST
    assert manifest.is_relative_to(tmp_path) and (job.tokenizer, job.n_vocab) == ("bytes", 257)
    corpus = open_corpus(job.plan.corpus)
    # Both splits begin with end-of-text.
    assert corpus.tokens("train") + corpus.tokens("val") == len(TEXT) + 2

    written = manifest.stat()
    assert resolve(config) == job
    assert manifest.stat().st_mtime_ns == written.st_mtime_ns

    manifest.unlink()  # as where the first start was interrupted
    assert resolve(config) == job
    assert manifest.exists()


# --- going on with a run

CHANGED: dict[str, Any] = {
    "data.seed": 1,
    "model.n_layer": 3,
    "model.n_head": 4,
    "model.n_embd": 64,
    "model.block_size": 32,
    "model.vocab_size": 384,
    "model.dropout": 0.1,
    "batch.tokens": 768,
    "batch.lanes": 8,
    "batch.micro": 2,
    "batch.ramp_start_tokens": 64,
    "batch.ramp_tokens": 2000,
    "optim.max_lr": 5e-4,
    "optim.min_lr": 2e-4,
    "optim.warmup_steps": 20,
    "optim.decay_tokens": 40_000,
    "optim.weight_decay": 0.2,
    "optim.betas": [0.8, 0.95],
    "optim.eps": 1e-6,
    "optim.grad_clip": 0.5,
    "train.seed": 1,
    "train.exact": True,
    "train.precision": "bf16",
    "train.compile": True,
    "scale.threads": 2,
}
"""Settings that make the model or the order of data, each with another value."""

MAY_CHANGE: dict[str, Any] = {
    "run.name": "second",
    "data.val_corpus": "{copy}",
    "data.segment_steps": 7,
    "data.corpus": "{copy}",
    "run.storage": "{copy}/../elsewhere",
    "train.steps": 200,
    "train.log_every": 7,
    "train.eval_every": 7,
    "train.eval_tokens": 160,
    "train.checkpoint_every": 7,
    "train.sample_prompt": "O",
    "train.sample_tokens": 7,
    "scale.workers": "1",
    "scale.gpus_per_worker": 1,
    "scale.cpus_per_worker": 2.0,
}
"""All others."""


def saved(job: Job) -> dict[str, Any]:
    """A job's identity as a checkpoint has it: it went through JSON."""
    return json.loads(json.dumps(job.metadata()))["identity"]


def with_setting(config: Config, name: str, value: Any) -> Config:
    return change(config, **{name.replace(".", "__"): value})


def test_every_setting_may_change_or_may_not() -> None:
    """A new setting has to be thought about: it belongs into one of the two lists."""
    assert sorted([*CHANGED, *MAY_CHANGE]) == sorted(setting_names())


def test_the_same_run_goes_on(config: Config) -> None:
    check_identity(resolve(config), saved(resolve(config)))


@pytest.mark.parametrize("name", CHANGED)
def test_another_model_or_order_is_refused(config: Config, name: str) -> None:
    before = resolve(config)
    job = resolve(with_setting(config, name, CHANGED[name]))
    section, field = name.split(".")
    old = json.loads(json.dumps(to_dict(config)[section][field]))
    assert old != CHANGED[name]
    message = refused(lambda: check_identity(job, saved(before)))
    assert f"run {job.run} cannot go on" in message and "--run.name" in message
    assert f" {name} was {old!r}, is {CHANGED[name]!r};" in message
    assert len(re.findall(r"was .*?, is ", message)) == 1
    # And the other way round.
    message = refused(lambda: check_identity(before, saved(job)))
    assert f" {name} was {CHANGED[name]!r}, is {old!r};" in message


def test_all_changes_are_told_at_once(config: Config) -> None:
    job = resolve(change(config, optim__eps=1e-6, train__seed=3, model__n_layer=1))
    message = refused(lambda: check_identity(job, saved(resolve(config))))
    for text in ("eps was 1e-08, is 1e-06;", "seed was 1337, is 3;", "n_layer was 2, is 1;"):
        assert text in message


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_other_settings_may_change(config: Config, path: Path, name: str) -> None:
    """The corpus may have moved, too: what counts is its content."""
    value = MAY_CHANGE[name]
    value = value.format(copy=path) if isinstance(value, str) else value
    job = resolve(with_setting(config, name, value))
    assert job.config != resolve(config).config
    check_identity(job, saved(resolve(config)))


def test_another_corpus_is_refused(config: Config, path: Path, made: Path) -> None:
    edit(path, lambda manifest: manifest["splits"]["train"]["shards"][0]["chunks"].reverse())
    job = resolve(change(config, data__corpus=str(path)))
    before, now = open_corpus(str(made)).fingerprint, open_corpus(str(path)).fingerprint
    message = refused(lambda: check_identity(job, saved(resolve(config))))
    assert f"corpus fingerprint was {before!r}, is {now!r};" in message and before != now


def test_more_steps_need_the_old_decay(config: Config) -> None:
    """By default the cosine ends with the run, so a longer run would bend it."""
    short = change(
        config, optim__decay_tokens=None, batch__ramp_tokens=0, batch__ramp_start_tokens=0
    )
    before, longer = resolve(short), change(short, train__steps=200)
    message = refused(lambda: check_identity(resolve(longer), saved(before)))
    assert "optim.decay_tokens was 47616, is 76800;" in message
    check_identity(resolve(change(longer, optim__decay_tokens=47_616)), saved(before))


def test_a_default_and_its_value_are_the_same(config: Config) -> None:
    """So that another default in a later version does not change the run unnoticed."""
    job = resolve(change(config, optim__min_lr=None))
    assert saved(job)["optim.min_lr"] == 6e-4 / 10
    check_identity(resolve(change(config, optim__min_lr=6e-4 / 10)), saved(job))


def test_config_json_is_good_as_settings(config: Config) -> None:
    """Whatever was a default when the run began stays what it was."""
    for given in (
        config,
        change(config, optim__min_lr=None, optim__decay_tokens=None),
        change(config, batch__ramp_tokens=0, batch__ramp_start_tokens=0, train__steps=77),
    ):
        job = resolve(given)
        again = resolve(from_dict(json.loads(json.dumps(job.settings()))))
        assert again.identity() == job.identity()
        assert again.settings() == job.settings()
        assert replace(again, config=job.config) == job
        check_identity(again, saved(job))


def test_config_json_is_good_in_another_folder(
    config: Config, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = resolve(change(config, data__corpus="copy", data__val_corpus="copy"))
    monkeypatch.chdir("/")
    assert resolve(from_dict(job.settings())).plan == job.plan


# --- derived numbers


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
    # 36,224 parameters of 4 bytes, twice 4 bytes of AdamW.
    assert rows["weights and optimizer"] == "0.1 MiB + 0.3 MiB + gradients 0.1 MiB a worker"


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
    assert numbers(rows["weights and optimizer"]) == [474.8, 949.7, 474.8]
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
    assert numbers(rows["weights and optimizer"]) == [650.45, 1300.91, 650.45]
    assert numbers(rows["training tokens"])[:2] == [314_572_800, 153_600]
    assert numbers(rows["steps per epoch"]) == [100.0]  # 314,572,800 / 3,145,728
    assert numbers(rows["accumulation"]) == [96, 1, 1536]
    assert numbers(rows["batch"]) == [3_145_728, 32_768, 12e9]
    steps, tokens, epochs = numbers(rows["steps"])
    assert steps == job.config.train.steps and 300e9 <= tokens < 300e9 + 3_145_728
    assert epochs == pytest.approx(tokens / 314_572_800, abs=0.006)
    assert rows["workers"].endswith("1 to 16 are legal, all give the same model")
