"""Damaged GGUF files: each is refused with SwanError or read exactly as the `gguf` package reads it.

SWAN_FUZZ_FILES: how many files (1,000 by default); SWAN_FUZZ_SEED: the first of their seeds. A failure names the seed
of its file, which alone makes it again.
"""

import contextlib
import copy
import os
import random
import signal
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.gguf_helpers import tiny_dit, tiny_t5
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.weights.assign import load_weights
from wan.weights.containers import gguf as reader
from wan.weights.names import official_names
from wan.weights.source import open_source

FILES = int(os.environ.get("SWAN_FUZZ_FILES", 2_000))
SEED = int(os.environ.get("SWAN_FUZZ_SEED", 0))
SECONDS = 5  # for one file
SLACK_BYTES = 2 << 20  # the window of the header and what Python needs for a few hundred entries
BATCHES = 10  # of each model


# Mutations: each takes the file and the length of its header, and changes the file in place.


def flip(data, head, rng):
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        data[position(data, head, rng)] ^= 1 << rng.randrange(8)


def set_byte(data, head, rng):
    data[position(data, head, rng)] = rng.choice((0, 1, 0x7C, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def boundary(data, head, rng):
    """A number of the header becomes one at which readers go wrong."""
    size = len(data)
    width = rng.choice((4, 8))
    values = (0, 1, 2, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
    value = rng.choice((*values, size - 1, size, size + 1, size - head, rng.randrange(size)))
    start = rng.randrange(4, head - 8)
    data[start : start + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def count(data, head, rng):
    """The numbers of tensors and of keys."""
    start = rng.choice((8, 16))
    old = int.from_bytes(data[start : start + 8], "little")
    value = rng.choice((0, 1, old - 1, old + 1, old * 2, 2**16, 2**32, 2**63, 2**64 - 1))
    data[start : start + 8] = (value % 2**64).to_bytes(8, "little")


def length(data, head, rng):
    """The length of a string, or another number that looks like one."""
    starts = [at for at in range(24, head - 8) if 0 < data[at] < 100 and not any(data[at + 1 : at + 8])]
    start = rng.choice(starts)
    old = data[start]
    value = rng.choice((0, old - 1, old + 1, old + 256, len(data) - start - 8, len(data), 2**32, 2**63, 2**64 - 1))
    data[start : start + 8] = (value % 2**64).to_bytes(8, "little")


def truncate(data, head, rng):
    del data[rng.choice((rng.randrange(len(data)), rng.randrange(head), len(data) - rng.randrange(1, 64))) :]


def extend(data, head, rng):
    data += rng.randbytes(rng.randrange(1, 200))


def duplicate(data, head, rng):
    start, end = span(data, head, rng)
    data[end:end] = data[start:end]


def delete(data, head, rng):
    start, end = span(data, head, rng)
    del data[start:end]


def swap(data, head, rng):
    start, end = span(data, head, rng)
    other = rng.randrange(len(data) - (end - start))
    one, two = data[start:end], data[other : other + end - start]
    data[start:end], data[other : other + end - start] = two, one


def name(data, head, rng):
    """A character of a name; where files differ in it, they hold other tensors."""
    letters = [at for at in range(24, head) if chr(data[at]).isalnum()]
    data[rng.choice(letters)] = rng.choice(b"abcxyz0189._/ \n\xc3")


MUTATIONS = [flip] * 5 + [set_byte] * 2 + [boundary] * 2 + [swap] * 2
MUTATIONS += [count, length, truncate, extend, duplicate, delete, name]


def position(data, head, rng):
    """Of a byte, mostly in the header."""
    return rng.randrange(min(head, len(data))) if rng.random() < 0.6 else rng.randrange(len(data))


def span(data, head, rng):
    start = position(data, head, rng)
    return start, min(start + rng.choice((1, 4, 8, 32, 100)), len(data))


def mutated(base, head, seed):
    """A damaged copy of `base`, and how it was made."""
    rng = random.Random(seed)
    data, done = bytearray(base), []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        mutation = rng.choice(MUTATIONS)
        if len(data) > head:
            mutation(data, head, rng)
            done.append(mutation.__name__)
    return bytes(data), f"seed {seed}: {', '.join(done)}"


# Checks


class Model(nn.Module):
    """Parameters of given names and shapes, and no computation."""

    def __init__(self, shapes):
        super().__init__()
        for path, shape in shapes.items():
            *parents, leaf = path.split(".")
            module = self
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))


class Base:
    """A sound file and an empty model for it."""

    def __init__(self, component, folder):
        self.component = component
        if component == "dit":
            path, config = tiny_dit(folder / "base.gguf")
            with torch.device("meta"):
                self._template = WanModel(**config)
        else:
            path = tiny_t5(folder / "base.gguf")
            source = open_source(path)
            names = official_names(source.keys(), component)
            self._template = Model({ours: source.info(theirs).shape for ours, theirs in names.items()})
        self.data = path.read_bytes()
        self.head = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
        self._model = copy.deepcopy(self._template)

    def model(self):
        """Without weights; the one handed out before, if it was not touched."""
        if not all(parameter.is_meta for parameter in self._model.parameters()):
            self._model = copy.deepcopy(self._template)
        return self._model


@pytest.fixture(scope="module", params=["dit", "t5"])
def base(request, tmp_path_factory):
    return Base(request.param, tmp_path_factory.mktemp("base"))


@contextlib.contextmanager
def time_limit():
    """Interrupts what hangs, where the system has alarms."""

    def stop(number, frame):
        raise TimeoutError(f"more than {SECONDS} s for one file")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_opening(path, size):
    """The source, or None if the file is refused. Either takes little memory."""
    tracemalloc.start()
    try:
        return open_source(path)
    except SwanError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return None
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 2 * size + SLACK_BYTES


def check_tensors(source, theirs):
    """Every tensor is refused, or is the one that the other reader finds. Returns whether none was refused."""
    assert source.keys() == list(theirs)
    whole = True
    for name, their in theirs.items():
        info = source.info(name)
        try:
            tensor = source.read(name)
        except SwanError:
            whole = False
            continue
        assert tuple(tensor.shape) == info.shape and tensor.dtype == info.dtype
        assert same(tensor, weights(their)), name
    return whole


def weights(their):
    """As the `gguf` package computes them; 64-bit and integer types as they are."""
    if their.data.dtype == np.uint8 or their.data.dtype == np.float16:
        return gguf.quants.dequantize(their.data, their.tensor_type)
    return their.data


def same(tensor, values):
    values = torch.from_numpy(np.array(values)).to(tensor.dtype).reshape(tensor.shape)
    return torch.equal(tensor, values) or (
        tensor.is_floating_point() and torch.allclose(tensor, values, rtol=0, atol=0, equal_nan=True)
    )


def check_model(base, source, theirs, whole):
    """The model is refused, or holds exactly the tensors of the file. Returns whether it was loaded."""
    try:
        model = load_weights(base.model(), source, base.component, dtype=torch.float32)
    except SwanError:
        return False
    assert whole, "a tensor that cannot be read was loaded"
    for name, stored in official_names(theirs, base.component).items():
        assert same(model.get_parameter(name), weights(theirs[stored])), name
    return True


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_files(base, tmp_path, monkeypatch, batch):
    asked = []
    allocate = reader.empty_bytes
    monkeypatch.setattr(reader, "empty_bytes", lambda size_bytes: asked.append(size_bytes) or allocate(size_bytes))
    path = tmp_path / "x.gguf"
    refused = opened = loaded = 0
    for index in range(max(1, FILES // (2 * BATCHES))):
        data, origin = mutated(base.data, base.head, f"{SEED} {base.component} {batch} {index}")
        path.write_bytes(data)
        asked.clear()
        try:
            with time_limit():
                source = check_opening(path, len(data))
                if source is None:
                    refused += 1
                    continue
                theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
                opened += 1
                whole = check_tensors(source, theirs)
                assert sum(asked) <= len(data)
                loaded += check_model(base, source, theirs, whole)
        except Exception as error:
            raise AssertionError(f"{origin}: {type(error).__name__}: {error}") from error
    if refused + opened >= 100:
        assert refused > 20 and opened > 5 and loaded > 0, "the mutations miss their mark"
    print(f"refused {refused}, opened {opened}, loaded {loaded}")
