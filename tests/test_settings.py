"""Settings in three layers: preset, YAML file, command line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raygpt.config import Config
from raygpt.errors import UserError
from raygpt.presets import PRESETS, preset
from raygpt.settings import load_settings
from raygpt.values import to_dict

ROOT = Path(__file__).parent.parent


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(*argv: str) -> Config:
    return load_settings(list(argv))[0]


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        load(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def load_yaml(file: Path, text: str, *argv: str) -> Config:
    file.write_text(text)
    return load(*argv, "--config", str(file))


def refused_yaml(file: Path, text: str, *argv: str) -> str:
    """The message without the path, which must come first."""
    file.write_text(text)
    message = refused(*argv, "--config", str(file))
    assert message.startswith(str(file))
    return message.removeprefix(str(file)).removeprefix(": ")


def test_presets() -> None:
    assert load() == preset("shakespeare") == PRESETS["shakespeare"]
    for name in PRESETS:
        assert load(name) == preset(name)
        assert load(name, "--train.steps", "7").run.name == name


def test_dry_run() -> None:
    assert load_settings([])[1] is False
    assert load_settings(["gpt2", "--dry-run"]) == (preset("gpt2"), True)
    assert load_settings(["--dry_run", "--train.steps", "3"])[1] is True


def test_command_line_forms() -> None:
    config = load("--optim.betas", "0.8", "0.9", "--optim.max-lr=1e-2", "--optim.min_lr", "None")
    assert config.optim.betas == (0.8, 0.9)
    assert (config.optim.max_lr, config.optim.min_lr) == (0.01, None)
    assert load("--train.compile", "True").train.compile is True
    assert load("--train.exact", "False").train.exact is False
    assert load("--train.exact", "None").train.exact is None
    assert load("--scale.workers", "1:2").scale.workers == "1:2"
    assert load("--train.sample_prompt", "").train.sample_prompt == ""
    assert load("--train.steps", "3", "--train.steps", "4").train.steps == 4


def test_layers(file: Path) -> None:
    text = "preset: gpt2\ntrain: {steps: 5, log_every: 2}\noptim:\n  max_lr: 1e-3\n"
    config = load_yaml(file, text, "--train.steps", "9")
    base = preset("gpt2")
    assert config == dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, steps=9, log_every=2),
        optim=dataclasses.replace(base.optim, max_lr=1e-3),
    )
    assert load("gpt2", f"--config={file}") == load("--config", str(file))


def test_layers_are_checked_together(file: Path) -> None:
    """What a file leaves at odds, the command line may mend."""
    text = "preset: gpt2\nmodel: {block_size: 96}\n"
    file.write_text(text)
    assert "is not divisible by batch.lanes x" in refused("--config", str(file))
    tokens = str(96 * preset("gpt2").batch.lanes)
    config = load_yaml(file, text, "--batch.tokens", tokens)
    assert config.batch.tokens == int(tokens)


def test_a_runs_config_json_is_a_settings_file(file: Path) -> None:
    config = load("gpt2", "--train.exact", "True", "--optim.betas", "0.5", "0.6")
    file.write_text(json.dumps(to_dict(config), indent=1))
    assert load("--config", str(file)) == config


def test_numbers_are_those_of_yaml_1_2(file: Path) -> None:
    for text, number in (("1e-3", 1e-3), ("1E-3", 1e-3), ("1", 1.0), (".5", 0.5), ("1.", 1.0)):
        assert load_yaml(file, f"optim: {{max_lr: {text}}}").optim.max_lr == number
    assert load_yaml(file, "batch: {tokens: 76_800}").batch.tokens == 76_800
    assert load_yaml(file, "scale: {workers: 1:2}").scale.workers == "1:2"
    assert load_yaml(file, "scale: {workers: 2}").scale.workers == "2"
    assert load_yaml(file, "run: {name: 2026-01-31}").run.name == "2026-01-31"
    assert load_yaml(file, "optim: {betas: [0, 1e-1]}").optim.betas == (0.0, 0.1)
    assert load_yaml(file, "train: {exact: null, compile: true}").train.compile is True


def test_an_empty_file_changes_nothing(file: Path) -> None:
    assert load_yaml(file, "# nothing\n") == preset("shakespeare")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--train.step 3", "unknown option --train.step; did you mean --train.steps?"),
        ("--lr 3", "unknown option --lr; did you mean --optim.max_lr?"),
        ("--dryrun", "unknown option --dryrun; did you mean --dry_run?"),
        ("--batch.lanes 3", "batch.lanes must be a power of two, got 3"),
        ("gpt2 gpt2-xl", "unexpected argument 'gpt2-xl'; PRESET comes first, and once"),
        ("--train.steps 3 gpt2", "unexpected argument 'gpt2'; PRESET comes first, and once"),
        ("--optim.betas 0.9 0.95 0.5", "unexpected argument '0.5'; PRESET comes first, and once"),
        ("--config", "option --config needs a file; see --help"),
        ("--config /no/such/file", "cannot read /no/such/file: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(argv: str, message: str) -> None:
    assert refused(*argv.split()) == message


@pytest.mark.parametrize(
    "argv",
    ["--train.steps x", "--train.steps", "--optim.betas 0.9", "--train.compile",
     "--train.precision fp8", "--optim.min_lr x", "--train.steps 1e3"],
)  # fmt: skip
def test_mistaken_values_name_the_option(argv: str) -> None:
    assert argv.split()[0] in refused(*argv.split())


def test_unknown_presets() -> None:
    assert "'gtp2'" in refused("gtp2") and "gpt2" in refused("gtp2").partition("'gtp2'")[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {step: 5}", "unknown setting 'train.step'; did you mean 'train.steps'?"),
        ("tran: {steps: 5}", "unknown section 'tran'; did you mean 'train'?"),
        ("train: {steps: '5'}", "train.steps must be a whole number, got '5' (str)"),
        ("train: {steps: 5.0}", "train.steps must be a whole number, got 5.0 (float)"),
        ("optim: {max_lr: [1, 2]}", "optim.max_lr must be a number, got [1, 2] (list)"),
        ("train: 5", "settings: 'train' must be a section with fields under it"),
        ("- train", " must hold sections such as 'train:' with settings under them"),
        ("batch: {lanes: 3}", "batch.lanes must be a power of two, got 3"),
        ("preset: [gpt2]", "preset must be a name, got ['gpt2']"),
        ("\nx: 1\nx: 2", ", line 3: not plain YAML ('x' stands there twice)"),
        ("? [a]\n: 1", ", line 1: not plain YAML (found unhashable key)"),
    ],
)
def test_mistakes_in_a_file(file: Path, text: str, message: str) -> None:
    assert refused_yaml(file, text) == message


@pytest.mark.parametrize("text", ["train: [", "a: b: c", "\0", "[" * 5000, "x: *unknown"])
def test_files_that_are_not_yaml(file: Path, text: str) -> None:
    assert "not plain YAML" in refused_yaml(file, text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused("--config", str(tmp_path)) == f"cannot read {tmp_path}: Is a directory"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert refused("--config", str(tmp_path / "binary")).endswith("it is not UTF-8 text")


def test_a_file_runs_no_code(file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    text = f"run: {{name: !!python/object/apply:os.mkdir ['{marker}']}}"
    assert "not plain YAML" in refused_yaml(file, text)
    assert not marker.exists()


def test_two_presets_are_refused(file: Path) -> None:
    message = refused_yaml(file, "preset: gpt2", "gpt2-xl")
    assert message.strip() == (
        "names the preset 'gpt2', the command line 'gpt2-xl'; drop one of them"
    )
    assert load("gpt2", "--config", str(file)) == preset("gpt2")


def test_help_shows_every_setting_and_the_presets(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    file.write_text("train: {steps: 4321}")
    with pytest.raises(SystemExit) as stop:
        load_settings(["gpt2", "--config", str(file), "--help"], "Train a model.")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Train a model." in shown and "PRESET" in shown and "gpt3-175b" in shown
    assert "--batch.ramp_start_tokens INT" in shown and "(default: 4321)" in shown
    assert "True or False" in shown
    for section, fields in to_dict(Config()).items():
        assert all(f"--{section}.{name} " in shown for name in fields)


def test_settings_need_neither_torch_nor_ray() -> None:
    code = "import sys, raygpt.settings; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
