"""Every rule that a setting must obey, and the way to plain values and back."""

import dataclasses
import json
from typing import Any

import pytest

from raygpt.config import Config
from raygpt.errors import UserError
from raygpt.values import from_dict, nearest, read_sections, setting_names, to_dict

WRONG: list[tuple[str, Any, str]] = [
    ("run.name", "", "run.name must be a plain folder name, got ''"),
    ("run.name", "a/b", "run.name must be a plain folder name, got 'a/b'"),
    ("run.name", "a\\b", "run.name must be a plain folder name, got 'a\\\\b'"),
    ("run.name", "..", "run.name must be a plain folder name, got '..'"),
    ("run.storage", "", "run.storage is empty"),
    ("data.segment_steps", 0, "data.segment_steps must be above 0, got 0"),
    ("model.n_layer", 0, "model.n_layer must be above 0, got 0"),
    ("model.n_head", 5, "model.n_embd 768 is not divisible by model.n_head 5"),
    ("model.n_embd", -1, "model.n_embd must be above 0, got -1"),
    ("model.block_size", 0, "model.block_size must be above 0, got 0"),
    ("model.vocab_size", 0, "model.vocab_size must be above 0, got 0"),
    ("model.dropout", 1.0, "model.dropout must lie in [0, 1), got 1.0"),
    ("model.dropout", float("nan"), "model.dropout must lie in [0, 1), got nan"),
    ("batch.tokens", 0, "batch.tokens must be above 0, got 0"),
    ("batch.tokens", 524_289, "524289 is not divisible by batch.lanes x model.block_size"),
    ("batch.lanes", 6, "batch.lanes must be a power of two, got 6"),
    ("batch.micro", 0, "batch.micro must be above 0, got 0"),
    ("batch.ramp_tokens", 8192, "batch.ramp_start_tokens and batch.ramp_tokens go together"),
    ("batch.ramp_start_tokens", 2**20, "batch.ramp_start_tokens and batch.ramp_tokens go together"),
    ("optim.max_lr", 0.0, "optim.max_lr must be above 0, got 0.0"),
    ("optim.max_lr", float("nan"), "optim.max_lr must be above 0, got nan"),
    ("optim.min_lr", -1.0, "optim.min_lr must not be negative, got -1.0"),
    ("optim.min_lr", 1.0, "optim.min_lr 1.0 is above optim.max_lr 0.0006"),
    ("optim.warmup_steps", -1, "optim.warmup_steps must not be negative, got -1"),
    ("optim.decay_tokens", 0, "optim.decay_tokens must be above 0, got 0"),
    ("optim.weight_decay", -0.1, "optim.weight_decay must not be negative, got -0.1"),
    ("optim.betas", [0.9, 1.0], "optim.betas must lie in [0, 1), got (0.9, 1.0)"),
    ("optim.eps", 0.0, "optim.eps must be above 0, got 0.0"),
    ("optim.grad_clip", -1.0, "optim.grad_clip must not be negative, got -1.0"),
    ("train.steps", 0, "train.steps must be above 0, got 0"),
    ("train.log_every", 0, "train.log_every must be above 0, got 0"),
    ("train.eval_every", -1, "train.eval_every must not be negative, got -1"),
    ("train.eval_tokens", -1, "train.eval_tokens must"),
    ("train.checkpoint_every", 0, "train.checkpoint_every must be above 0, got 0"),
    ("train.sample_tokens", -1, "train.sample_tokens must not be negative, got -1"),
    ("scale.workers", "0", "scale.workers must be N or MIN:MAX, got '0'"),
    ("scale.workers", "1:2:3", "scale.workers must be N or MIN:MAX, got '1:2:3'"),
    ("scale.workers", "many", "scale.workers must be N or MIN:MAX, got 'many'"),
    ("scale.workers", "4:2", "scale.workers 4:2: MIN is larger than MAX"),
    ("scale.workers", "9", "scale.workers 9 is more than batch.lanes 8"),
    ("scale.gpus_per_worker", 2, "scale.gpus_per_worker must be 0 or 1, got 2"),
    ("scale.cpus_per_worker", 0.0, "scale.cpus_per_worker must be above 0, got 0.0"),
    ("scale.threads", 0, "scale.threads must be above 0, got 0"),
]

WRONG_TYPES: list[tuple[str, Any, str]] = [
    ("train.steps", "5", "train.steps must be a whole number, got '5' (str)"),
    ("train.steps", 5.0, "train.steps must be a whole number, got 5.0 (float)"),
    ("train.steps", True, "train.steps must be a whole number, got True (bool)"),
    ("train.steps", None, "train.steps must be a whole number, got nothing"),
    ("train.compile", 1, "train.compile must be true or false, got 1 (int)"),
    ("train.exact", "yes", "train.exact must be true or false, got 'yes' (str)"),
    ("train.precision", "fp8", "train.precision must be one of auto, fp32, bf16, got 'fp8' (str)"),
    ("train.precision", [], "train.precision must be one of auto, fp32, bf16, got [] (list)"),
    ("optim.max_lr", "fast", "optim.max_lr must be a number, got 'fast' (str)"),
    ("optim.max_lr", [1e-3], "optim.max_lr must be a number, got [0.001] (list)"),
    ("optim.max_lr", True, "optim.max_lr must be a number, got True (bool)"),
    ("optim.min_lr", "x", "optim.min_lr must be a number, got 'x' (str)"),
    ("optim.betas", 0.9, "optim.betas must be a list of 2, got 0.9 (float)"),
    ("optim.betas", [0.9], "optim.betas must be a list of 2, got [0.9] (list)"),
    ("optim.betas", "09", "optim.betas must be a list of 2, got '09' (str)"),
    ("optim.betas", [0.9, "x"], "optim.betas must be a number, got 'x' (str)"),
    ("run.name", 1.5, "run.name must be text, got 1.5 (float)"),
    ("data.corpus", None, "data.corpus must be text, got nothing"),
    ("scale.workers", False, "scale.workers must be text, got False (bool)"),
]


def with_setting(name: str, value: Any) -> Config:
    section, field = name.split(".")
    return from_dict({section: {field: value}})


def refused(values: Any) -> str:
    with pytest.raises(UserError) as error:
        from_dict(values)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_values_out_of_range(name: str, value: Any, message: str) -> None:
    section, field = name.split(".")
    assert message in refused({section: {field: value}})


@pytest.mark.parametrize(("name", "value", "message"), WRONG_TYPES)
def test_values_of_the_wrong_type(name: str, value: Any, message: str) -> None:
    section, field = name.split(".")
    assert refused({section: {field: value}}) == message


def test_ramp_rules() -> None:
    def ramp(start: int) -> dict[str, Any]:
        return {"batch": {"ramp_start_tokens": start, "ramp_tokens": 10**9}}

    assert from_dict(ramp(32_768)).batch.ramp_start_tokens == 32_768
    assert "is larger than batch.tokens 524288" in refused(ramp(2**20))
    assert "batch.ramp_start_tokens 32769 is not divisible by" in refused(ramp(32_769))


def test_a_batch_that_would_fit_is_named() -> None:
    assert refused({"batch": {"tokens": 500_000}}).endswith("= 8192; 499712 would be")
    assert refused({"batch": {"tokens": 10}}).endswith("= 8192; 8192 would be")


def test_unknown_names() -> None:
    message = refused({"train": {"step": 1}})
    assert message == "unknown setting 'train.step'; did you mean 'train.steps'?"
    assert "did you mean 'optim.max_lr'?" in refused({"train": {"max_lr": 1}})
    assert refused({"trian": {}}) == "unknown section 'trian'; did you mean 'train'?"
    assert refused({"train": 3}) == "settings: 'train' must be a section with fields under it"
    assert refused({3: {}}).startswith("unknown section '3'; did you mean ")
    assert refused({"train": {4: 1}}).startswith("unknown setting 'train.4'; did you mean ")
    assert refused([1]) == "settings must be sections with fields under them, got [1] (list)"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("lr", "optim.max_lr"), ("batch.token", "batch.tokens"), ("model.n-layers", "model.n_layer")],
)
def test_nearest(given: str, meant: str) -> None:
    assert nearest(given, setting_names()) == meant


def test_lenient_where_nothing_can_be_meant_otherwise() -> None:
    assert with_setting("optim.max_lr", 1).optim.max_lr == 1.0
    assert isinstance(with_setting("optim.max_lr", 1).optim.max_lr, float)
    assert with_setting("optim.betas", [0, 0.5]).optim.betas == (0.0, 0.5)
    assert with_setting("scale.workers", 2).scale.max_workers == 2
    assert with_setting("optim.min_lr", None).optim.min_lr is None
    assert with_setting("train.exact", True).train.exact is True


def test_plain_values_and_back() -> None:
    changed = from_dict(
        {
            "run": {"name": "x"},
            "optim": {"betas": [0.8, 0.9], "min_lr": 1e-5},
            "batch": {"ramp_start_tokens": 32_768, "ramp_tokens": 10**9},
            "scale": {"workers": "1:4", "gpus_per_worker": 0},
        }
    )
    for config in (Config(), changed):
        plain = to_dict(config)
        assert sorted(f"{s}.{f}" for s in plain for f in plain[s]) == sorted(setting_names())
        assert from_dict(plain) == config
        assert from_dict(json.loads(json.dumps(plain))) == config
    assert from_dict({}, changed) is not None and from_dict({}, changed) == changed
    assert from_dict({"train": {"steps": 3}}, changed).optim == changed.optim


def test_sections_alone_leave_the_rest_to_a_later_layer() -> None:
    sections = read_sections({"batch": {"lanes": 1024}}, Config())
    assert list(sections) == ["batch"] and sections["batch"].lanes == 1024
    assert "is not divisible" in refused({"batch": {"lanes": 1024}})


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def test_derived_values() -> None:
    assert Config().windows_per_lane == 524_288 // (8 * 1024)
    assert Config().min_lr == pytest.approx(6e-5)
    assert with_setting("optim.min_lr", 0.0).min_lr == 0.0
    scale = with_setting("scale.workers", "2:8").scale
    assert (scale.min_workers, scale.max_workers) == (2, 8)
    assert with_setting("data.segment_steps", 7).segment_steps == 7
