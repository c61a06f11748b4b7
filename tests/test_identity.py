"""A run goes on only as the run it was."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resolved import change, edit, refused
from resolved import config as config
from resolved import made as made
from resolved import path as path

from raygpt.config import Config
from raygpt.data.corpus import open_corpus
from raygpt.train.job import Job, check_identity, resolve
from raygpt.values import from_dict, setting_names, to_dict

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
    "model.positions": "rotary",
    "model.norm": "rms",
    "model.qk_norm": True,
    "model.activation": "relu2",
    "model.bias": False,
    "optim.matrices": "muon",
    "optim.muon_lr": 0.01,
    "optim.muon_momentum": 0.9,
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
    "run.storage_patience": 7.0,
    "run.mlflow": "http://127.0.0.1:5000",
    "run.wandb": "project",
    "train.steps": 200,
    "train.log_every": 7,
    "train.eval_every": 7,
    "train.eval_tokens": 160,
    "train.checkpoint_every": 7,
    "train.sample_prompt": "O",
    "train.sample_tokens": 7,
    "train.straggler_factor": 2.0,
    "train.activation_checkpointing": True,
    "train.profile": "2:4",
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


def test_a_run_from_before_a_setting_existed_goes_on(config: Config) -> None:
    earlier = saved(resolve(config))
    del earlier["model.norm"]
    check_identity(resolve(config), earlier)
    job = resolve(change(config, model__norm="rms"))
    assert "model.norm was 'layer', is 'rms';" in refused(lambda: check_identity(job, earlier))


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
