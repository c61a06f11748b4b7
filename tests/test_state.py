"""Checkpoints: whole or absent, the same bits back, never the last good one deleted."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import OPTIMIZER_FILE, WEIGHTS_FILE
from saved import CONFIG, N_VOCAB, Run, cut, flip_a_bit
from saved import run as run

from raygpt.errors import UserError
from raygpt.storage import Folder
from raygpt.train.checkpoints import (
    METADATA,
    DamagedCheckpoint,
    Position,
    _content_sha256,
    checkpoint_name,
    latest,
    open_checkpoint,
    prune,
    steps_of,
)
from raygpt.train.state import load_model, restore

FILES = [METADATA, WEIGHTS_FILE, OPTIMIZER_FILE]


def test_a_restored_run_trains_on_to_the_same_bits(run: Run) -> None:
    run.train(3)
    saved = run.save(3)
    run.train(2, seed=1)

    other = Run(run.path, seed=2)
    other.train(1, seed=5)  # a state of its own, which must go
    checkpoint = latest(run.folder)
    assert checkpoint is not None and checkpoint.position == saved.position
    restore(checkpoint, other.model, other.optimizer)
    other.train(2, seed=1)
    assert other.weights() == run.weights()
    assert checkpoint.weights_sha256 == saved.weights_sha256


def test_every_tensor_of_the_optimizer_comes_back(run: Run) -> None:
    run.train(2)
    before = run.optimizer.state_dict()["state"]
    assert len(before) == len(list(run.model.parameters()))
    other = Run(run.path, seed=2)
    restore(run.save(2), other.model, other.optimizer)
    after = other.optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for number, state in before.items():
        assert state.keys() == after[number].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, tensor in state.items():
            assert torch.equal(tensor, after[number][key]), (number, key)
            assert tensor.dtype == after[number][key].dtype


def test_a_checkpoint_before_the_first_step_restores(run: Run) -> None:
    other = Run(run.path, seed=2)
    restore(run.save(0), other.model, other.optimizer)
    assert other.weights() == run.weights()
    assert not other.optimizer.state


def test_position_and_metadata_come_back(run: Run) -> None:
    saved = run.save(7, val_loss=2.5)
    found = open_checkpoint(saved.folder)
    assert found.position == Position(7, tokens=448, skipped=1, val_loss=2.5)
    assert found.metadata == json.loads(json.dumps(saved.metadata))  # tuples are lists there
    assert json.loads(run.file(7, METADATA).read_bytes())["settings"]["model"]["n_embd"] == 16


def test_each_file_is_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.train(1)
    run.save(1)
    read: list[str] = []
    read_bytes = Folder.read_bytes

    def count(folder: Folder, name: str) -> bytes:
        read.append(name)
        return read_bytes(folder, name)

    monkeypatch.setattr(Folder, "read_bytes", count)
    found = latest(run.folder)
    assert found is not None
    restore(found, run.model, run.optimizer)
    assert sorted(read) == sorted(FILES)


def test_no_code_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a checkpoint went through pickle")

    run.train(1)
    for module, name in [
        *((pickle, name) for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler")),
        *((torch, name) for name in ("save", "load")),
    ]:
        monkeypatch.setattr(module, name, refuse)
    restore(run.save(1), run.model, run.optimizer)
    load_model(str(run.path))
    assert sorted(path.name for path in run.file(1, "").iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (flip_a_bit, WEIGHTS_FILE, "its sha256 does not match"),
        (flip_a_bit, OPTIMIZER_FILE, "its sha256 does not match"),
        (cut, WEIGHTS_FILE, "bytes instead of"),
        (cut, OPTIMIZER_FILE, "bytes instead of"),
        (cut, METADATA, "is damaged"),
        (Path.unlink, WEIGHTS_FILE, "is missing"),
        (Path.unlink, OPTIMIZER_FILE, "is missing"),
        (Path.unlink, METADATA, "was never finished"),
        (lambda path: path.write_bytes(b""), METADATA, "is damaged"),
        (lambda path: path.write_bytes(b"[]"), METADATA, "is damaged"),
        (lambda path: path.write_bytes(b"\xff{}"), METADATA, "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    run: Run, damage: Callable[[Path], object], name: str, said: str
) -> None:
    run.train(1)
    run.save(10)
    weights = run.weights()
    run.train(1)
    run.save(20)
    damage(run.file(20, name))

    found, messages = run.latest()
    assert found is not None and found.position.step == 10
    assert len(messages) == 1 and said in messages[0]
    assert checkpoint_name(20) in messages[0] and "using the checkpoint before it" in messages[0]
    if name != METADATA:
        assert str(run.file(20, name)) in messages[0]
    restore(found, run.model, run.optimizer)
    assert run.weights() == weights


def test_damage_after_verification_is_noticed(run: Run) -> None:
    checkpoint = run.save(1)
    flip_a_bit(run.file(1, WEIGHTS_FILE))
    with pytest.raises(DamagedCheckpoint, match="sha256"):
        restore(checkpoint, run.model, run.optimizer)


def test_a_run_without_a_whole_checkpoint_is_not_started_anew(run: Run) -> None:
    for step in (10, 20):
        run.save(step)
        flip_a_bit(run.file(step, WEIGHTS_FILE))
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged .*00010.*00020"):
        run.latest()
    with pytest.raises(UserError, match="no checkpoint in"):
        load_model(str(run.path))


def test_a_run_that_never_finished_a_checkpoint_has_none(run: Run) -> None:
    assert run.latest() == (None, [])
    run.save(10)
    run.file(10, METADATA).unlink()
    found, messages = run.latest()
    assert found is None
    assert len(messages) == 1 and "was never finished" in messages[0]


def test_a_format_from_the_future_is_refused(run: Run) -> None:
    run.save(10)
    run.save(20)
    path = run.file(20, METADATA)
    content = {**json.loads(path.read_text()), "format": 99}
    del content["sha256"]
    path.write_text(json.dumps({**content, "sha256": _content_sha256(content)}))
    with pytest.raises(UserError, match="has format 99; this raygpt reads 1"):
        run.latest()


def test_saving_again_mends_a_damaged_checkpoint(run: Run) -> None:
    run.save(10)
    flip_a_bit(run.file(10, WEIGHTS_FILE))
    cut(run.file(10, METADATA))
    run.save(10)
    found, messages = run.latest()
    assert found is not None and messages == []


def save_interrupted(run: Run, step: int, writes: int, patch: pytest.MonkeyPatch) -> None:
    """A save that stops after so many of its writes."""
    write, left = Folder.write_bytes, iter(range(writes))

    def stop(folder: Folder, name: str, data: bytes | memoryview) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(folder, name, data)

    with patch.context() as inside, pytest.raises(KeyboardInterrupt):
        inside.setattr(Folder, "write_bytes", stop)
        run.save(step)


def contents(run: Run, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.file(step, "").iterdir()}


@pytest.mark.parametrize("writes", range(len(FILES)))
def test_an_interrupted_save_is_no_checkpoint(
    run: Run, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(10)
    save_interrupted(run, 20, writes, monkeypatch)
    found, messages = run.latest()
    assert found is not None and found.position.step == 10
    assert len(messages) == (writes > 0)  # before the first one there is no folder
    assert all("was never finished" in message for message in messages)


@pytest.mark.parametrize("damaged", [None, *FILES[1:]])
@pytest.mark.parametrize("writes", range(len(FILES)))
def test_an_interrupted_save_over_a_checkpoint_never_mixes_the_two(
    run: Run, writes: int, damaged: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other bytes, whole or damaged: there is the old one or the one before, never both."""
    run.save(10)
    run.save(20)
    old = contents(run, 20)
    if damaged:
        flip_a_bit(run.file(20, damaged))
    run.train(1)
    save_interrupted(run, 20, writes, monkeypatch)
    now = contents(run, 20)
    written = FILES[1:][:writes]  # metadata comes last
    assert {name for name in FILES if now[name] != old[name]} == {*written, damaged} - {None}
    found, messages = run.latest()
    assert found is not None
    if writes or damaged:
        assert found.position.step == 10
        assert len(messages) == 1 and "is damaged" in messages[0]
    else:
        assert found.position.step == 20 and messages == []


@pytest.mark.parametrize("writes", range(len(FILES)))
def test_an_interrupted_save_of_the_same_bytes_costs_nothing(
    run: Run, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As survivors write them that rescue one state, the last of them cut off."""
    saved = run.save(20)
    save_interrupted(run, 20, writes, monkeypatch)
    found, messages = run.latest()
    assert found is not None and found.position.step == 20 and messages == []
    assert found.weights_sha256 == saved.weights_sha256


def test_the_latest_two_and_the_best_are_kept(run: Run) -> None:
    for step, val_loss in ((10, 3.0), (20, 2.0), (30, None), (40, 2.5), (50, 2.2)):
        prune(run.folder, run.save(step, val_loss))
    assert steps_of(run.folder) == [20, 40, 50]
    for step in steps_of(run.folder):
        open_checkpoint(run.folder.child(checkpoint_name(step)))


def test_of_equally_good_ones_the_later_is_kept(run: Run) -> None:
    for step in (10, 20, 30, 40):
        prune(run.folder, run.save(step, 2.0 if step < 30 else 3.0))
    assert steps_of(run.folder) == [20, 30, 40]


def test_without_validation_two_are_kept(run: Run) -> None:
    for step in (10, 20, 30):
        prune(run.folder, run.save(step))
    assert steps_of(run.folder) == [20, 30]


def test_unfinished_folders_go_and_the_run_keeps_its_other_files(run: Run) -> None:
    run.save(10)
    run.file(10, METADATA).unlink()
    (run.path / "metrics.jsonl").write_text("{}\n")
    (run.path / "checkpoint_of_mine").mkdir()
    run.save(20)
    prune(run.folder, run.save(30))
    assert sorted(path.name for path in run.path.iterdir()) == [
        checkpoint_name(20), checkpoint_name(30), "checkpoint_of_mine", "metrics.jsonl",
    ]  # fmt: skip


def test_pruning_never_takes_the_checkpoint_just_written(run: Run) -> None:
    """Damaged ones around it do not count for more than it does."""
    for step in (10, 20, 40):
        run.save(step, val_loss=1.0)
        flip_a_bit(run.file(step, WEIGHTS_FILE))
    prune(run.folder, run.save(30, val_loss=9.0))
    found, _ = run.latest()
    assert found is not None and found.position.step == 30


def test_metadata_goes_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a deletion which is interrupted leaves no checkpoint that looks whole."""
    for step in (10, 20):
        run.save(step)
    newest = run.save(30)

    def stop(folder: Folder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "delete", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(run.folder, newest)
    assert not run.file(10, METADATA).exists()
    assert run.file(10, WEIGHTS_FILE).exists()


def test_another_models_weights_are_refused(run: Run) -> None:
    run.train(1)
    checkpoint = run.save(1)
    wide = Run(run.path, replace(CONFIG.model, n_embd=32))
    before = wide.weights()
    with pytest.raises(UserError, match=r"do not fit the model: .* has shape \(\d+"):
        restore(checkpoint, wide.model, wide.optimizer)
    assert wide.weights() == before
    deep = Run(run.path, replace(CONFIG.model, n_layer=3))
    with pytest.raises(UserError, match=r"transformer\.h\.2\.\S+ has shape None there and \("):
        restore(checkpoint, deep.model, deep.optimizer)


def test_load_model_takes_a_checkpoint_or_a_run(run: Run) -> None:
    weights = {}
    for step, val_loss in ((10, 2.0), (20, 1.0), (30, 3.0)):
        run.train(1, seed=step)
        run.save(step, val_loss)
        weights[step] = run.weights()

    def loaded(path: Path) -> int:
        result = load_model(str(path))
        assert [p.detach().numpy().tobytes() for p in result.model.parameters()] == weights[
            result.step
        ]
        assert not result.model.training
        assert result.model.n_vocab == N_VOCAB and result.tokenizer_name == "bytes"
        assert result.config == CONFIG
        assert result.path == str(run.path / checkpoint_name(result.step))
        return result.step

    assert loaded(run.path) == 20  # the best
    assert loaded(run.path / checkpoint_name(30)) == 30
    flip_a_bit(run.file(20, WEIGHTS_FILE))
    said: list[str] = []
    assert load_model(str(run.path), said.append).step == 10
    assert len(said) == 1 and checkpoint_name(20) in said[0]
    with pytest.raises(DamagedCheckpoint, match="sha256"):
        loaded(run.path / checkpoint_name(20))


def test_load_model_without_validation_takes_the_latest(run: Run) -> None:
    run.save(10)
    run.save(20)
    assert load_model(str(run.path)).step == 20


def test_load_model_says_where_it_found_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"no checkpoint in {path}; give the folder of a run"):
            load_model(str(path))
