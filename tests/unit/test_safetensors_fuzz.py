"""Damaged safetensors files and indexes: each is refused with SwanError, or every tensor is what its header says."""

import json
import math

import pytest
import torch
from safetensors.torch import save, save_file

from tests.mutations import ANYWHERE, BATCHES, mutated, survive
from tests.unit.weight_helpers import memory_asked_for
from wan.weights.source import open_source

TENSORS = {
    "blocks.0.ffn.0.weight": torch.arange(24.0).reshape(4, 6),
    "blocks.0.ffn.0.bias": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "steps": torch.arange(5),
}
SHARDS = {
    "m-00001-of-00002.safetensors": {"a": torch.ones(2), "b": torch.zeros(3)},
    "m-00002-of-00002.safetensors": {"c": torch.arange(4)},
}
INDEX = {"metadata": {"total_size": 52}, "weight_map": {name: file for file, held in SHARDS.items() for name in held}}


def key(data, rng):
    """A name of the header or of an entry becomes another, or one that is there."""
    starts = [at for at in range(len(data)) if data[at] == ord('"')]
    if len(starts) > 1:
        at = rng.randrange(len(starts) - 1)
        words = (b"shape", b"dtype", b"data_offsets", b"__metadata__", b"steps", b"../a", b"F8_E4M3", b"\\u0000", b"")
        data[starts[at] + 1 : starts[at + 1]] = rng.choice(words)


def nest(data, rng):
    """A value becomes one of another kind."""
    starts = [at for at in range(len(data)) if data[at] in b":[,"]
    if starts:
        at = rng.choice(starts) + 1
        values = (b"[" * 3000, b'{"a":1},', b"null,", b"true,", b"-1,", b"[],", b'"' + b"x" * 5000 + b'",')
        data[at:at] = rng.choice(values)


JSON_CHANGES = (*ANYWHERE, *[key] * 3, *[nest] * 2)


def with_length(data):
    """A header that was changed in length, and the data behind it, as its file."""
    return len(data).to_bytes(8, "little") + data


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_files(tmp_path, monkeypatch, batch):
    path = tmp_path / "x.safetensors"
    whole = save(TENSORS, metadata={"format": "pt", "note": "hello"})
    head = 8 + int.from_bytes(whole[:8], "little")

    def attempt(data):
        path.write_bytes(data)
        check(path, data, monkeypatch)

    survive([whole], batch, attempt, head=head)
    # As often, the header's length is right and what is in it is not.
    survive([whole[8:head]], batch, lambda text: attempt(with_length(text) + whole[head:]), changes=JSON_CHANGES)


def check(path, data, monkeypatch):
    """Against a reading of the header that trusts it."""
    with memory_asked_for(monkeypatch, 2 * len(data)):
        source = open_source(path)
        tensors = {name: source.read(name) for name in source.keys()}
    head = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:head])
    header.pop("__metadata__", None)
    assert tensors.keys() == header.keys()
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        assert list(tensors[name].shape) == entry["shape"]
        assert stored(tensors[name]) == data[head + start : head + end]


def stored(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_indexes(tmp_path, batch):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.full((2,), 7.0)}, tmp_path / "outside.safetensors")
    for file, held in SHARDS.items():
        save_file(held, folder / file)
    path = folder / "m.safetensors.index.json"
    values = {name: tensor for held in SHARDS.values() for name, tensor in held.items()}

    def attempt(data):
        path.write_bytes(data)
        source = open_source(folder)
        assert set(source.keys()) <= values.keys()
        assert json.loads(data.decode("utf-8-sig"))["weight_map"].keys() <= set(source.keys())
        assert all(torch.equal(source.read(name), values[name]) for name in source.keys())

    survive([json.dumps(INDEX).encode()], batch, attempt, changes=JSON_CHANGES)


def test_the_mutations_hit(tmp_path):
    """Some files are still read, and most are not."""
    whole, read = save(TENSORS), 0
    for seed in range(200):
        data = mutated(whole, seed, head=math.ceil(len(whole) * 0.7))
        (tmp_path / "x.safetensors").write_bytes(data)
        try:
            read += len(open_source(tmp_path / "x.safetensors").keys()) > 0
        except Exception:
            continue
    assert 5 < read < 150
