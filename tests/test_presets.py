"""The named runs: sizes and schedules of the papers."""

import pytest
import torch

from raygpt.config import EMBEDDED_CORPUS, ModelConfig
from raygpt.data.order import BatchSchedule
from raygpt.errors import UserError
from raygpt.model import GPT
from raygpt.presets import PRESETS, preset
from raygpt.sizes import num_params
from raygpt.values import from_dict, to_dict

GPT2_SIZES = {  # parameters of the released models, whose vocabulary is 50,257
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
GPT3_TABLE = {  # Brown et al. 2020, table 2.1: size, layers, batch in millions of tokens, rate
    "gpt3-125m": (125e6, 12, 0.5, 6.0e-4),
    "gpt3-350m": (350e6, 24, 0.5, 3.0e-4),
    "gpt3-760m": (760e6, 24, 0.5, 2.5e-4),
    "gpt3-1.3b": (1.3e9, 24, 1.0, 2.0e-4),
    "gpt3-2.7b": (2.7e9, 32, 1.0, 1.6e-4),
    "gpt3-6.7b": (6.7e9, 32, 2.0, 1.2e-4),
    "gpt3-13b": (13e9, 40, 2.0, 1.0e-4),
    "gpt3-175b": (175e9, 96, 3.2, 0.6e-4),
}


def test_every_preset_is_known() -> None:
    modern = [f"{name}-modern" for name in GPT2_SIZES]
    text = ["shakespeare", "shakespeare-modern"]
    assert list(PRESETS) == [*text, *GPT2_SIZES, *modern, *GPT3_TABLE]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    config = preset(name)
    assert config.run.name == name
    assert from_dict(to_dict(config)) == config
    assert config.data.corpus == (EMBEDDED_CORPUS if "shakespeare" in name else "")
    assert config.windows_per_lane % config.batch.micro == 0
    with torch.device("meta"):
        model = GPT(config.model)
    assert model.num_params() == num_params(config.model)


@pytest.mark.parametrize("name", GPT2_SIZES)
def test_gpt2_sizes(name: str) -> None:
    config = preset(name)
    model = config.model
    unpadded = ModelConfig(model.n_layer, model.n_head, model.n_embd, model.block_size, 50_257)
    assert num_params(unpadded) == GPT2_SIZES[name]
    assert num_params(model) == GPT2_SIZES[name] + 47 * model.n_embd
    assert config.batch.tokens == 524_288
    assert config.train.steps == 19_073 and config.optim.warmup_steps == 715


@pytest.mark.parametrize("name", ["shakespeare", *GPT2_SIZES])
def test_modern_runs_stand_beside_those_of_gpt2(name: str) -> None:
    plain, modern = preset(name), preset(f"{name}-modern")
    assert plain.model.is_gpt2 and plain.optim.matrices == "adamw"
    assert not modern.model.is_gpt2 and modern.optim.matrices == "muon"
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size")
    assert all(getattr(plain.model, size) == getattr(modern.model, size) for size in sizes)
    if name != "shakespeare":
        assert (modern.batch, modern.train) == (plain.batch, plain.train)


def test_gpt2_124m_pads_to_124_48_million() -> None:
    assert num_params(preset("gpt2").model) / 1e6 == pytest.approx(124.48, abs=0.005)


@pytest.mark.parametrize("name", GPT3_TABLE)
def test_gpt3_sizes_and_schedules(name: str) -> None:
    size, n_layer, batch, max_lr = GPT3_TABLE[name]
    config = preset(name)
    assert num_params(config.model) == pytest.approx(size, rel=0.025)
    assert config.model.n_layer == n_layer and config.model.block_size == 2048
    assert config.batch.tokens == pytest.approx(batch * 1e6, rel=0.05)
    assert config.optim.max_lr == max_lr and config.min_lr == pytest.approx(max_lr / 10)
    warmup = config.optim.warmup_steps * config.batch.tokens
    assert warmup == pytest.approx(375e6, rel=0.005)
    assert config.optim.decay_tokens == 260_000_000_000
    assert config.batch.ramp_start_tokens == 32_768
    assert 4e9 <= config.batch.ramp_tokens <= 12e9


@pytest.mark.parametrize("name", GPT3_TABLE)
def test_gpt3_runs_end_with_the_step_that_reaches_300_billion_tokens(name: str) -> None:
    config = preset(name)
    batch, T = config.batch, config.model.block_size
    g0 = batch.ramp_start_tokens // (batch.lanes * T)
    schedule = BatchSchedule(batch.lanes, T, config.windows_per_lane, g0, batch.ramp_tokens)
    assert schedule.tokens(0) == 32_768
    last = config.train.steps - 1
    assert schedule.tokens_before(last) < 300e9 <= schedule.tokens_before(last + 1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("gtp2", "gpt2"), ("gpt2_xl", "gpt2-xl"), ("gpt3-13", "gpt3-13b"), ("shake", "shakespeare")],
)
def test_an_unknown_preset_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown preset '{name}'; did you mean '{near}'"):
        preset(name)
