"""A state in files: the same bytes for every number of workers, and nobody else's to read."""

import hashlib
import json
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import OPTIMIZER_FILE, WEIGHTS_FILE
from hypothesis import given
from hypothesis import strategies as st
from saved import Run
from saved import run as run
from torch import Tensor, nn

from raygpt.errors import UserError
from raygpt.train import parts as parts_module
from raygpt.train.checkpoints import METADATA, is_whole_set, open_checkpoint
from raygpt.train.parts import Part, Snapshots, cut_into_parts, share_of
from raygpt.train.state import load_model, restore

SMALL = 4096
"""With files of so many bytes the tiny model needs several; some of its tensors are larger."""
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (7,), (2, 3), (1, 2, 3)]


@pytest.fixture(params=[None, SMALL], ids=["one file", "several"])
def trained(request: pytest.FixtureRequest, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Two steps done; its state is a file of each kind, or several."""
    if request.param:
        monkeypatch.setattr(parts_module, "PART_BYTES", request.param)
    run.train(2)
    return run


def size(part: Part) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in part.tensors.values())


def taken(parts: list[Part]) -> dict[str, bytes]:
    snapshots = Snapshots(pinned=False)
    return {part.file: bytes(snapshots.take(part)) for part in parts}


def live(run: Run) -> dict[str, Tensor]:
    """All tensors of a state under the names that files have for them."""
    states = {
        f"{key}.{name}": value
        for name, parameter in run.model.named_parameters()
        for key, value in sorted(run.optimizer.state[parameter].items())
    }
    return {**{name: p.detach() for name, p in run.model.named_parameters()}, **states}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# --- cutting and dealing


def test_every_tensor_is_in_one_file(trained: Run) -> None:
    parts = cut_into_parts(trained.model, trained.optimizer)
    files = [part.file for part in parts]
    assert files == sorted(set(files)), "in order, none twice"
    names = [name for part in parts for name in part.tensors]
    assert names == list(live(trained))
    for part in parts:
        assert size(part) <= parts_module.PART_BYTES or len(part.tensors) == 1


def test_names_say_how_many_there_are(trained: Run) -> None:
    files = [part.file for part in cut_into_parts(trained.model, trained.optimizer)]
    if parts_module.PART_BYTES != SMALL:
        assert files == [WEIGHTS_FILE, OPTIMIZER_FILE]
        return
    for kind in ("model", "optimizer"):
        mine = [file for file in files if file.startswith(kind)]
        assert len(mine) > 2
        assert mine == [
            f"{kind}-{i + 1:05d}-of-{len(mine):05d}.safetensors" for i in range(len(mine))
        ]
    assert is_whole_set(files)
    assert not is_whole_set(files[:-1])


@pytest.mark.parametrize("world_size", range(1, 9))
def test_shares_are_a_partition_of_the_files_and_change_no_byte(
    trained: Run, world_size: int
) -> None:
    parts = cut_into_parts(trained.model, trained.optimizer)
    shares = [share_of(parts, rank, world_size) for rank in range(world_size)]
    dealt = [part.file for share in shares for part in share]
    assert sorted(dealt) == [part.file for part in parts]
    files: dict[str, bytes] = {}
    for share in shares:
        files |= taken(share)
    assert files == taken(parts)


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=40), world_size=st.integers(1, 12))
def test_shares_are_balanced_within_the_largest_file(sizes: list[int], world_size: int) -> None:
    parts = [
        Part(f"{number}", {"x": torch.empty(count, dtype=torch.uint8)})
        for number, count in enumerate(sizes)
    ]
    shares = [share_of(parts, rank, world_size) for rank in range(world_size)]
    assert sorted(int(part.file) for share in shares for part in share) == list(range(len(sizes)))
    loads = [sum(map(size, share)) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


def test_a_tied_weight_is_written_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    model.a.weight.sum().backward()
    optimizer.step()
    weights, states = cut_into_parts(model, optimizer)
    assert list(weights.tensors) == ["a.weight"]
    assert sorted(states.tensors) == ["exp_avg.a.weight", "exp_avg_sq.a.weight", "step.a.weight"]


# --- files


def test_safetensors_itself_reads_each_file(trained: Run) -> None:
    """Two readers of the format's authors: one of bytes and one of files; the same bits."""
    checkpoint = trained.save(2)
    expected, found = live(trained), set[str]()
    for name in checkpoint.metadata["files"]:
        path = trained.file(2, name)
        tensors = safetensors.torch.load(path.read_bytes())
        with safetensors.safe_open(path, framework="pt") as file:
            assert set(file.keys()) == tensors.keys()
            for key in tensors:
                assert bits(file.get_tensor(key)) == bits(tensors[key]) == bits(expected[key])
                assert tensors[key].shape == expected[key].shape
                assert tensors[key].dtype == expected[key].dtype
        found |= tensors.keys()
    assert found == expected.keys()


def names_of_tensors() -> st.SearchStrategy[str]:
    return st.text(string.printable + "äß→\U0001f600", min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"  # the format's own word
    )


@given(st.data())
def test_any_tensors_come_back(data: st.DataObject) -> None:
    """Mixed dtypes, scalars, empty ones, strided ones: the bits of each, NaNs among them."""
    names = data.draw(st.lists(names_of_tensors(), min_size=1, max_size=8, unique=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    tensors: dict[str, Tensor] = {}
    for name in names:
        shape = data.draw(st.sampled_from(SHAPES))
        dtype = data.draw(st.sampled_from(DTYPES))
        count = math.prod(shape) * dtype.itemsize
        raw = torch.randint(0, 256, (max(count, 1),), generator=generator, dtype=torch.uint8)
        if dtype == torch.bool:
            raw %= 2
        tensor = raw[:count].view(dtype).view(shape)
        tensors[name] = tensor.mT if len(shape) >= 2 and data.draw(st.booleans()) else tensor
    (file,) = taken([Part("model.safetensors", tensors)]).values()
    loaded = safetensors.torch.load(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)


def test_a_header_is_padded_so_that_tensors_are_aligned() -> None:
    for length in range(1, 20):
        tensors = {"x" * length: torch.ones(3, dtype=torch.bool), "y": torch.ones(5).double()}
        (file,) = taken([Part("model.safetensors", tensors)]).values()
        header = int.from_bytes(file[:8], "little")
        entries = json.loads(file[8 : 8 + header])
        assert header % 8 == 0
        for name, entry in entries.items():
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0


def test_the_order_of_tensors_is_that_of_the_model() -> None:
    """Not that of a hash table, so equal states are equal files in every process."""
    tensors = {name: torch.zeros(2) for name in "zebra"}
    assert taken([Part("model.safetensors", tensors)]) == taken(
        [Part("model.safetensors", dict(tensors))]
    )
    (file,) = taken([Part("model.safetensors", tensors)]).values()
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    assert list(header) == list("zebra")


def test_a_snapshot_does_not_change_with_the_state(trained: Run) -> None:
    snapshots = Snapshots(pinned=False)
    parts = cut_into_parts(trained.model, trained.optimizer)
    views = {part.file: snapshots.take(part, part.file) for part in parts}
    before = {file: bytes(view) for file, view in views.items()}
    trained.train(1)
    assert {file: bytes(view) for file, view in views.items()} == before
    for file in before:
        safetensors.torch.load(before[file])

    again = cut_into_parts(trained.model, trained.optimizer)
    after = {part.file: bytes(snapshots.take(part, part.file)) for part in again}
    assert after.keys() == before.keys() and all(after[f] != before[f] for f in after)
    assert after == taken(again)  # in memory that was used before


def test_one_place_takes_parts_of_any_size() -> None:
    """The optimizer has no state before its first step."""
    snapshots = Snapshots(pinned=False)
    for tensors in ({}, {"a": torch.ones(3)}, {"a": torch.ones(3), "b": torch.zeros(9)}, {}):
        file = bytes(snapshots.take(Part("optimizer.safetensors", tensors)))
        assert file == taken([Part("optimizer.safetensors", tensors)])["optimizer.safetensors"]
        assert safetensors.torch.load(file).keys() == tensors.keys()


# --- checkpoints of several files


def test_a_checkpoint_goes_round(trained: Run) -> None:
    """Saved, verified, loaded: by a run that goes on and by whoever uses the model."""
    saved = trained.save(2)
    found = open_checkpoint(saved.folder)
    other = Run(trained.path, seed=2)
    other.train(1, seed=5)
    restore(found, other.model, other.optimizer)
    assert {name: bits(t) for name, t in live(other).items()} == {
        name: bits(t) for name, t in live(trained).items()
    }
    loaded = load_model(str(trained.path)).model
    assert [bits(p) for p in loaded.parameters()] == trained.weights()
    trained.train(2, seed=1)
    other.train(2, seed=1)
    assert other.weights() == trained.weights()


def test_a_state_that_was_loaded_has_the_same_files(trained: Run) -> None:
    """safetensors gives a file's tensors in another order each time; two survivors of a restarted
    group would overwrite each other's files with other bytes."""
    found = open_checkpoint(trained.save(2).folder)
    files = taken(cut_into_parts(trained.model, trained.optimizer))
    other = Run(trained.path, seed=2)
    other.train(1, seed=5)
    for _ in range(8):
        restore(found, other.model, other.optimizer)
        assert taken(cut_into_parts(other.model, other.optimizer)) == files


def test_weights_have_one_hash(trained: Run) -> None:
    saved = trained.save(2)
    digests = [
        hashlib.sha256(trained.file(2, name).read_bytes())
        for name in sorted(saved.metadata["files"])
        if name.startswith("model")
    ]
    if len(digests) == 1:
        assert saved.weights_sha256 == digests[0].hexdigest()
    else:
        joined = b"".join(digest.digest() for digest in digests)
        assert saved.weights_sha256 == hashlib.sha256(joined).hexdigest()
    assert open_checkpoint(saved.folder).weights_sha256 == saved.weights_sha256
    assert trained.save(9).weights_sha256 == saved.weights_sha256  # of another step
    trained.optimizer.state.clear()
    assert trained.save(2).weights_sha256 == saved.weights_sha256  # of another optimizer
    trained.train(1)
    assert trained.save(3).weights_sha256 != saved.weights_sha256


def test_files_of_an_earlier_cut_do_not_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is written again in another number of files, as after an update."""
    run.train(1)
    for part_bytes in (2**27, SMALL, 2 * SMALL, 2**27):
        monkeypatch.setattr(parts_module, "PART_BYTES", part_bytes)
        saved = run.save(1)
        other = Run(run.path, seed=2)
        restore(open_checkpoint(saved.folder), other.model, other.optimizer)
        assert other.weights() == run.weights()


def other_names() -> Iterator[str]:
    yield from ("../x", "../model.safetensors", "/etc/passwd", "checkpoint.json", "", ".", "..")
    yield from ("model", "model.safetensors/x", "x/model.safetensors", "model.safetensors\n")
    yield from ("Model.safetensors", "model.bin", "weights.safetensors", "model..safetensors")
    yield from ("model-1-of-2.safetensors", "model-00001-of-00002.safetensors.tmp")
    yield from ("model-00001-of-\u0662\u0662\u0662\u0662\u0662.safetensors", "\0")


@pytest.mark.parametrize("name", list(other_names()))
@pytest.mark.parametrize("instead", [True, False])
def test_other_files_are_refused(run: Run, name: str, instead: bool) -> None:
    """checkpoint.json decides which files are read, so no other names will do."""
    run.save(10)
    run.save(20)
    path = run.file(20, METADATA)
    content: dict[str, Any] = json.loads(path.read_text())
    entry = content["files"].pop(WEIGHTS_FILE) if instead else content["files"][WEIGHTS_FILE]
    content["files"][name] = entry
    path.write_text(json.dumps(content))
    _refused(run, path)


@pytest.mark.parametrize("kept", [[], [WEIGHTS_FILE], [OPTIMIZER_FILE]])
def test_missing_kinds_are_refused(run: Run, kept: list[str]) -> None:
    run.save(10)
    run.save(20)
    path = run.file(20, METADATA)
    content: dict[str, Any] = json.loads(path.read_text())
    content["files"] = {name: content["files"][name] for name in kept}
    path.write_text(json.dumps(content))
    _refused(run, path)


def test_a_set_that_is_not_whole_is_refused(trained: Run) -> None:
    """One of several files left out of checkpoint.json is not a checkpoint of fewer tensors."""
    trained.save(1)
    saved = trained.save(2)
    path = trained.file(2, METADATA)
    for name in saved.metadata["files"]:
        content: dict[str, Any] = json.loads(path.read_text())
        content["files"] = {n: e for n, e in saved.metadata["files"].items() if n != name}
        path.write_text(json.dumps(content))
        _refused(trained, path, usable=1)


def _refused(run: Run, path: Path, usable: int = 10) -> None:
    found, messages = run.latest()
    assert found is not None and found.position.step == usable
    (message,) = messages
    assert message.startswith(f"{path} is damaged: ")
    with pytest.raises(UserError, match="is damaged"):
        load_model(str(path.parent))
