"""A run, resolved: wrong inputs are told in one line, and paths are good everywhere."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resolved import TEXT, TRAIN_WINDOWS, VAL_WINDOWS, change, edit, make_corpus, refused
from resolved import config as config
from resolved import made as made
from resolved import made_gpt2 as made_gpt2
from resolved import path as path

from raygpt.config import Config
from raygpt.data.corpus import MANIFEST, open_corpus
from raygpt.presets import preset
from raygpt.train.job import resolve, with_absolute_storage


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


# --- paths


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


@pytest.mark.parametrize(
    ("vocab_size", "tokenizer"),
    [(257, "bytes"), (320, "bytes"), (321, "gpt2-321"), (1024, "gpt2-1024"),
     (50_256, "gpt2-50256"), (50_257, "gpt2"), (50_304, "gpt2")],
)  # fmt: skip
def test_the_embedded_text_has_as_many_words_as_the_model(
    vocab_size: int, tokenizer: str, tmp_path: Path
) -> None:
    config = change(
        preset("shakespeare"), model__vocab_size=vocab_size, run__storage=str(tmp_path),
        model__block_size=512, batch__tokens=2048,
    )  # fmt: skip
    assert resolve(config).tokenizer == tokenizer


def test_the_embedded_text_is_made_into_a_corpus_once(tmp_path: Path) -> None:
    config = change(
        preset("shakespeare"), run__storage=str(tmp_path),
        model__block_size=512, model__vocab_size=320, batch__tokens=2048,
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
