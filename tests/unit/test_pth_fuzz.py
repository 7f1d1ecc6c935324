"""Damaged and hostile PyTorch checkpoints: each is refused with SwanError, or its tensors are as torch reads them."""

import io
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch

from tests.mutations import ANYWHERE, BATCHES, survive
from tests.unit.weight_helpers import memory_asked_for
from wan.weights.source import open_source

SHARED = torch.arange(12, dtype=torch.float16)
TENSORS = {
    "blocks.0.ffn.0.weight": torch.arange(24.0).reshape(4, 6),
    "blocks.0.ffn.0.bias": torch.ones(4, dtype=torch.bfloat16),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "part": SHARED[2:8].view(2, 3),
    "whole": SHARED,
    "parameter": torch.nn.Parameter(torch.ones(3), requires_grad=False),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "codes": torch.arange(8).to(torch.float8_e4m3fn),
}


def saved(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


CONTENTS = (
    TENSORS,
    {"state_dict": OrderedDict(TENSORS), "epoch": 3, "betas": (0.9, 0.95), "name": "a", "rest": [None]},
)
ZIPPED = [saved(content) for content in CONTENTS]
# torch writes 8-bit floats in the old format, and cannot read them.
ROWS = [saved({name: tensor for name, tensor in TENSORS.items() if name != "codes"}, zipped=False)]


def check(path, data, monkeypatch):
    path.write_bytes(data)
    with memory_asked_for(monkeypatch, 7 * len(data)):  # three times what is read, and a view's gaps
        source = open_source(path)
        tensors = {name: source.read(name) for name in source.keys()}
    assert sum(tensor.nbytes for tensor in tensors.values()) <= 3 * len(data)
    for name, tensor in tensors.items():
        info = source.info(name)
        assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype and tensor.is_contiguous()
        if info.shape and info.shape[0]:
            last = (info.shape[0] - 1, info.shape[0])
            assert stored(source.read(name, last)) == stored(tensor[-1:])
    try:
        theirs = torch.load(path, weights_only=True, mmap=data.startswith(b"PK"))
    except Exception:  # it asks for more than is needed here: versions, sums of bytes
        return 0
    theirs = next(one for one in (theirs, *theirs.values()) if isinstance(one, dict) and tensors.keys() <= one.keys())
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape, name
        assert stored(theirs[name].detach()) == stored(tensor), name
    return 1


def stored(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(tmp_path, monkeypatch, batch, zipped):
    compared = []
    attempt = lambda data: compared.append(check(tmp_path / "x.pth", data, monkeypatch))  # noqa: E731
    survive(ZIPPED if zipped else ROWS, batch, attempt)
    assert sum(compared) > 0, "no file was read"


def opcode(data, rng):
    """An instruction of the pickle becomes another, or more of them come."""
    at, codes = (
        rng.randrange(len(data)),
        b"(.0123NJKMLI]}u)asbcRQP\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x90\x91\x92\x93\x94\x95",
    )
    new = bytes(rng.choice(codes) for _ in range(rng.choice((1, 1, 2, 300))))
    data[at : at + rng.choice((0, 1))] = new


def number(data, rng):
    """A number of the pickle: a size, a stride, an offset, an index of the memo."""
    starts = [at for at in range(len(data) - 2) if data[at : at + 1] in b"KMJqrhj"]
    if starts:
        at = rng.choice(starts)
        width = {b"M": 2, b"J": 4, b"r": 4, b"j": 4}.get(bytes(data[at : at + 1]), 1)
        wide = b"\x8a\x08" + rng.choice((2**62, 2**40, 2**63 - 1, 7)).to_bytes(8, "little")
        narrow = data[at : at + 1] + rng.randbytes(width)
        data[at : at + 1 + width] = rng.choice((narrow, narrow, wide))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_pickles(tmp_path, monkeypatch, batch):
    """All is right with the archive, and its pickle is not."""
    with zipfile.ZipFile(io.BytesIO(ZIPPED[0])) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    compared = []

    def attempt(data):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, data if name.endswith("data.pkl") else content)
        compared.append(check(tmp_path / "x.pth", file.getvalue(), monkeypatch))

    bases = [records["archive/data.pkl"]]
    survive(bases, batch, attempt, changes=(*ANYWHERE, *[opcode] * 3, *[number] * 6))
    assert sum(compared) > 0, "no file was read"


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


class Stored:
    """Pickled as a storage."""

    def __init__(self, kind, key, count):
        self.id = ("storage", kind, key, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Stored) else None


def hostile(seed):
    """A checkpoint of tensors with sizes, strides and offsets out of any order."""
    rng = random.Random(seed)
    sizes = (0, 1, 1, 2, 3, 4, 8, 16, 100, 2**16, 2**31, 2**40, 2**62, 2**63, 2**64, 10**300, -1, True, None, "x", 1.5)

    def size():
        return rng.choice(sizes[:9] if rng.random() < 0.9 else sizes)

    def tensor():
        kinds = (torch.FloatStorage, torch.HalfStorage, torch.LongStorage, torch.BoolStorage, torch.UntypedStorage)
        storage = Stored(rng.choice(kinds), str(rng.randrange(3)), size())
        axes = rng.choice((0, 1, 2, 2, 3, 40))
        shape, stride = (tuple(size() for _ in range(axes)) for _ in range(2))
        stride = stride if rng.random() < 0.9 else stride[1:]
        made = [torch._utils._rebuild_tensor_v2, storage, size(), shape, stride, False, OrderedDict()]
        if rng.random() < 0.1:
            made = [
                torch._utils._rebuild_tensor_v3,
                *made[1:],
                rng.choice((torch.uint16, torch.float8_e5m2, torch.int8)),
            ]
        if rng.random() < 0.05:
            made = made[: rng.randrange(1, len(made))]
        return Call(*made)

    content = {f"t{index}": tensor() for index in range(rng.choice((1, 2, 3)))}
    pickled = io.BytesIO()
    Pickler(pickled, protocol=2).dump(content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/version", "3")
        for key in range(3):
            archive.writestr(f"archive/data/{key}", rng.randbytes(rng.choice((0, 4, 64, 400))))
    return file.getvalue()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_hostile_pickles(tmp_path, monkeypatch, batch):
    compared = []

    def attempt(data):
        compared.append(check(tmp_path / "x.pth", data, monkeypatch))

    survive([hostile(f"{batch} {index}") for index in range(100)], batch, attempt, changes=(lambda data, rng: None,))
    assert sum(compared) > 0, "no file was read"
