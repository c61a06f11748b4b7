"""Sampling, and the job that does it."""

import importlib
from pathlib import Path

import pytest
import torch

from raygpt.config import Config, ModelConfig
from raygpt.data.tokenizer import load_tokenizer
from raygpt.errors import UserError
from raygpt.generate import generate, sample_text
from raygpt.model import GPT
from raygpt.train.state import LoadedModel

BYTES = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=320)


def _model(n_vocab: int = 257) -> GPT:
    torch.manual_seed(2)
    model = GPT(BYTES, n_vocab)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # sharper than an untrained model, which all but ignores its input
    return model


def _prompt(*tokens: int) -> torch.Tensor:
    return torch.tensor([tokens])


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sequences_keep_their_prompt_and_get_their_length() -> None:
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    result = generate(_model(), idx, 20, generator=_seeded())
    assert result.shape == (2, 20) and result.dtype == torch.int64
    assert torch.equal(result[:, :3], idx)
    assert torch.equal(generate(_model(), idx, 3), idx)


def test_greedy_tokens_are_those_of_the_cropped_context() -> None:
    """Beyond block_size the model sees the last block_size tokens."""
    model = _model()
    result = generate(model, _prompt(1, 2), 24, temperature=0)
    for position in range(2, 24):
        context = result[:, max(0, position - 8) : position]
        assert result[0, position] == model(context)[0, -1].argmax()
    assert len(set(result[0, 2:].tolist())) > 1


def test_the_same_generator_gives_the_same_tokens() -> None:
    first = generate(_model(), _prompt(1), 30, generator=_seeded(1))
    assert torch.equal(first, generate(_model(), _prompt(1), 30, generator=_seeded(1)))
    assert not torch.equal(first, generate(_model(), _prompt(1), 30, generator=_seeded(2)))


def test_top_k_limits_the_choice() -> None:
    model = _model()
    idx = _prompt(1).expand(400, 1)
    likely = set(model(idx[:1])[0, -1].topk(3).indices.tolist())
    drawn = generate(model, idx, 2, top_k=3, temperature=4.0, generator=_seeded())[:, 1]
    assert set(drawn.tolist()) == likely
    every = generate(model, idx, 2, top_k=None, temperature=4.0, generator=_seeded())[:, 1]
    assert len(set(every.tolist())) > 30


def test_frequencies_follow_the_probabilities_at_each_temperature() -> None:
    model = _model()
    for temperature in (0.5, 2.0):
        probabilities = torch.softmax(model(_prompt(1))[0, -1, :257] / temperature, -1)
        drawn = generate(
            model,
            _prompt(1).expand(20_000, 1),
            2,
            top_k=None,
            temperature=temperature,
            generator=_seeded(),
        )[:, 1]
        counts = torch.bincount(drawn, minlength=257) / 20_000
        assert (counts - probabilities).abs().max() < 0.015


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_no_temperature_is_too_small(temperature: float) -> None:
    model = _model()
    result = generate(model, _prompt(1), 4, temperature=temperature, generator=_seeded())
    assert torch.equal(result, generate(model, _prompt(1), 4, top_k=1, generator=_seeded()))


def test_padding_is_never_sampled() -> None:
    model = _model(n_vocab=5)
    result = generate(
        model, _prompt(1).expand(200, 1), 10, top_k=320, temperature=50.0, generator=_seeded()
    )
    assert set(result.flatten().tolist()) == set(range(5))


def test_texts_begin_with_the_prompt_and_depend_on_the_seed() -> None:
    tokenizer = load_tokenizer("bytes")

    def sampled(seed: int) -> list[str]:
        return sample_text(_model(), tokenizer, "To be", num_return_sequences=3, seed=seed)

    texts = sampled(1)
    assert len(texts) == 3 and all(text.startswith("To be") for text in texts)
    assert len(set(texts)) == 3
    assert texts == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": ""}, "--prompt is empty"),
        ({"prompt": "a\udcff"}, "--prompt is not valid UTF-8 at character 1"),
        ({"prompt": "x" * 31}, "--prompt has 31 tokens, more than --max-length 30"),
        ({"top_k": 0}, "--top-k must be above 0, got 0"),
        ({"num_return_sequences": 0}, "--num-return-sequences must be above 0"),
        ({"max_length": -1}, "--max-length must be above 0"),
        ({"temperature": -0.5}, "--temperature must not be negative"),
        ({"temperature": float("nan")}, "--temperature must not be negative"),
        ({"seed": -1}, "--seed must lie in"),
    ],
)
def test_mistakes_are_named(changed: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_text(_model(), load_tokenizer("bytes"), **{"prompt": "x", **changed})


def test_the_job_prints_and_writes_every_sequence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = importlib.import_module("jobs.sample")
    loaded = LoadedModel(_model().eval(), "bytes", 7, "runs/x/checkpoint_00000007", Config())
    monkeypatch.setattr(job, "load_model", lambda path, say: loaded)
    output = tmp_path / "new" / "output.txt"
    arguments = ["--checkpoint", "runs/x", "--prompt", "To be", "--max-length", "9"]
    monkeypatch.setattr("sys.argv", ["sample.py", *arguments, "--output", str(output)])

    job.main()
    printed = capsys.readouterr().out
    assert "runs/x/checkpoint_00000007, step 7" in printed
    assert printed.count("> To be") == 5
    assert output.read_text() in printed
    assert f"wrote {output}" in printed

    first = output.read_bytes()
    job.main()
    assert f"replaced {output}" in capsys.readouterr().out
    assert output.read_bytes() == first
