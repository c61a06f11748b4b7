"""Exported models, as transformers sees them: offline, with the same losses and ids."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing may be downloaded

import pytest
import torch
import transformers

from raygpt.config import Config, ModelConfig
from raygpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from raygpt.errors import UserError
from raygpt.export import export, weights
from raygpt.model import GPT
from raygpt.train.state import LoadedModel

SIZES: dict[str, Any] = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 16}
VOCAB_SIZES = {"gpt2": 50_304, "gpt2-1024": 1024, "bytes": 320}
TEXTS = [
    "Hello, I'm a language model,",
    "",
    " ",
    "  two  spaces   three\t\ttabs\n\n\nlines \r\n end ",
    "don't WE'LL they'Re it's",
    "naïve café Ünïcödé ẞ ﬁ \uff21 e\u0301",
    "日本語のテキスト 中文 한국어 العربية עברית हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 👍🏽 🤷",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2.5e-3]}  # comment\n",
    "\x00\x01\x7f\x80\xa0\xad\u200b\u2028\ufeff",
    "1234567890 3.14159 ½ Ⅷ ๓",
    "<|endoftext", "|>", "...!?--==//\\\\",
    "a" * 200,
]  # fmt: skip


def _model(tokenizer: str) -> GPT:
    torch.manual_seed(3)
    model = GPT(
        ModelConfig(**SIZES, vocab_size=VOCAB_SIZES[tokenizer]), load_tokenizer(tokenizer).n_vocab
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases and LayerNorms away from 0 and 1, too
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module", params=list(VOCAB_SIZES))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, GPT, Path]:
    """Name of a tokenizer, a random model, and the folder it was exported to."""
    name: str = request.param
    folder = tmp_path_factory.mktemp("export") / name
    model = _model(name)
    export(model, model.config, load_tokenizer(name), str(folder))
    return name, model, folder


def test_transformers_computes_the_same_logits_and_losses(
    exported: tuple[str, GPT, Path],
) -> None:
    name, model, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(theirs, transformers.GPT2LMHeadModel)
    assert theirs.dtype == torch.float32
    idx = torch.randint(0, model.n_vocab, (2, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = theirs.eval()(idx).logits
        loss = theirs(idx, labels=idx).loss
        assert logits.shape == (2, 16, load_tokenizer(name).n_vocab)
        torch.testing.assert_close(model(idx)[..., : model.n_vocab], logits, atol=1e-4, rtol=0)
        assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(loss.item(), abs=1e-5)


def test_every_weight_is_used(exported: tuple[str, GPT, Path]) -> None:
    _, model, folder = exported
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    padding = model.config.vocab_size - model.n_vocab
    assert theirs.num_parameters() == model.num_params() - padding * model.config.n_embd
    assert theirs.config.activation_function == "gelu_new"
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == model.n_vocab - 1


def test_a_model_of_transformers_gives_our_model_its_logits() -> None:
    torch.manual_seed(6)
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = GPT(ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=50)).eval()
    state = theirs.state_dict()
    shapes = {name: tensor.shape for name, tensor in weights(ours).items()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            assert shapes[name] == state[name].shape
            conv1d = ".h." in name and name.endswith(
                ("c_attn.weight", "c_proj.weight", "c_fc.weight")
            )
            parameter.copy_(state[name].T if conv1d else state[name])
        idx = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)


def test_ids_and_texts_are_the_same_through_autotokenizer(
    exported: tuple[str, GPT, Path],
) -> None:
    name, _, folder = exported
    ours, theirs = load_tokenizer(name), transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.n_vocab
    assert theirs.eos_token == END_OF_TEXT and theirs.eos_token_id == ours.eot
    shakespeare = Path(__file__).parents[1] / "raygpt" / "assets" / "tinyshakespeare.txt"
    for text in [*TEXTS, shakespeare.read_text()[:50_000]]:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    assert theirs(END_OF_TEXT)["input_ids"] == [ours.eot]


def test_every_token_has_our_bytes(exported: tuple[str, GPT, Path]) -> None:
    """Token by token, and that every merge makes the token of its rank."""
    name, _, folder = exported
    ours, theirs = load_tokenizer(name), transformers.AutoTokenizer.from_pretrained(folder)
    for token in range(0, ours.n_vocab, 97):
        assert theirs.decode([token]) == ours.decode([token])
    model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    made = [model["vocab"][merge.replace(" ", "")] for merge in model["merges"]]
    assert made == list(range(256, ours.eot))
    assert (folder / "merges.txt").read_text().splitlines()[1:] == model["merges"]


def test_nothing_in_the_folder_is_code(exported: tuple[str, GPT, Path]) -> None:
    _, _, folder = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    model = _model("bytes")
    for output in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="is not an empty folder"):
            export(model, model.config, load_tokenizer("bytes"), str(output))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "changed",
    [
        {"positions": "rotary"},
        {"norm": "rms"},
        {"qk_norm": True},
        {"bias": False},
        {"activation": "relu2"},
    ],
)
def test_a_model_that_is_no_gpt2_stays_here(tmp_path: Path, changed: dict[str, Any]) -> None:
    tokenizer = load_tokenizer("bytes")
    config = ModelConfig(1, 2, 16, 8, 320, **changed)
    with pytest.raises(UserError, match="not GPT-2's"):
        export(GPT(config, tokenizer.n_vocab), config, tokenizer, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_must_be_the_models(tmp_path: Path) -> None:
    model = _model("bytes")
    with pytest.raises(UserError, match="tokenizer gpt2 has 50257 tokens, the model 257"):
        export(model, model.config, load_tokenizer("gpt2"), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_the_job_says_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = importlib.import_module("jobs.export")
    model = _model("bytes")
    loaded = LoadedModel(
        model, "bytes", 7, "runs/x/checkpoint_00000007", Config(model=model.config)
    )
    monkeypatch.setattr(job, "load_model", lambda path, say: loaded)
    output = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["export.py", "--checkpoint", "runs/x", "--output", str(output)]
    )
    job.main()
    assert f"step 7, to {output}: config.json" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(output).config.n_layer == 3
