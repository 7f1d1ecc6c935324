"""Files that somebody else made: where they are, what they are, and whether they stay what they were."""

import argparse
import io
import json
import os
import socket
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wan.errors import SwanError
from wan.plan.files import size_of
from wan.tasks import load_task
from wan.weights.infer import told_heads
from wan.weights.locate import locate
from wan.weights.source import config_beside, open_source

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
WRITERS = {"x.safetensors": save_file, "x.pth": torch.save}


def refused(path, match):
    with pytest.raises(SwanError, match=match) as error:
        open_source(path)
    assert str(error.value).isprintable()
    return str(error.value)


def write_index(folder, weight_map, bom=False):
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8-sig" if bom else "utf-8")
    return path


# What is no plain file is refused at once: to read a pipe would wait for its writer.


def special(folder, kind):
    path = folder / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    return path


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "socket"])
def test_what_is_no_plain_file(tmp_path, kind):
    path = special(tmp_path, kind)
    refused(path, "not a plain file")
    write_index(tmp_path, {"a": "x.safetensors"})
    refused(tmp_path, "1 of 1 shards are missing")


def test_paths_that_cannot_be_opened(tmp_path):
    refused(special(tmp_path, "link to itself"), "cannot be opened")
    refused(tmp_path / ("x" * 5000), "cannot be opened: File name too long")
    refused("x\0.safetensors", "x.x00.safetensors: cannot be opened")
    save_file(TENSORS, tmp_path / "y.safetensors")
    refused(tmp_path / "y.safetensors" / "z", "cannot be opened: Not a directory")


def test_names_are_printed_without_control_characters(tmp_path):
    (tmp_path / "\x1b[31mred\n.safetensors").write_bytes(b"\0" * 64)
    assert r"\x1b[31mred\n.safetensors" in refused(tmp_path / "\x1b[31mred\n.safetensors", "damaged")
    name = "a\x1b]0;title\x07\n"
    save_file({name: torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({name: torch.ones(2)}, tmp_path / "2.safetensors")
    assert r"tensor a\x1b]0;title\x07\n is in both" in refused(
        [tmp_path / "1.safetensors", tmp_path / "2.safetensors"], "is in both"
    )


# Files that change


def overwrite(path, other):
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(1, 1))


def replace(path, other):
    """By another file of the same size and time."""
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "change, match",
    [
        (overwrite, "changed after it was opened"),
        (replace, "changed after it was opened"),
        (lambda path, other: os.truncate(path, path.stat().st_size - 1), "changed after it was opened"),
        (lambda path, other: path.unlink(), "removed after it was opened"),
    ],
)
def test_a_file_that_changes_after_it_was_opened(tmp_path, name, change, match):
    path, other = tmp_path / name, tmp_path / f"other_{name}"
    WRITERS[name](TENSORS, path)
    WRITERS[name]({key: tensor + 1 for key, tensor in TENSORS.items()}, other)
    source = open_source(path)
    change(path, other)
    out = torch.empty(4, dtype=torch.bfloat16)
    for use in (lambda: source.read("a.weight"), lambda: source.read("b", (1, 2)), lambda: source.read_into("b", out)):
        with pytest.raises(SwanError, match=match):
            use()


# Headers and indexes


def test_a_name_that_is_twice_among_many(tmp_path):
    """Looked for in linear time: by pairs, 100,000 names would take minutes."""
    text = b"{" + b",".join(b'"%d":1' % index for index in range(100_000)) + b',"z":1,"z":2}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(tmp_path / "x.safetensors", "duplicate name z")
    text = '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}'
    (tmp_path / "m.safetensors.index.json").write_text(text)
    refused(tmp_path, "duplicate name a")


def test_small_texts_that_take_much_memory(tmp_path):
    for text in (b'{"a":' + b"[],[]," * 500_000, b"[" * 1_000_000):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        refused(tmp_path / "x.safetensors", "too many values|nested too deeply")


@pytest.mark.parametrize(
    "name, match",
    [
        ("../x.safetensors", "no file name below this folder"),
        ("a/../../x.safetensors", "no file name below this folder"),
        ("..\\x.safetensors", "no file name below this folder"),
        ("/etc/passwd", "no file name below this folder"),
        ("C:\\x.safetensors", "no file name below this folder"),
        (".", "no file name below this folder"),
        ("", "no file name below this folder"),
        ("x\0", "no file name below this folder"),
        (5, "a int, which is no file name"),
        (None, "a NoneType, which is no file name"),
        (["x"], "a list, which is no file name"),
        ("folder", "missing: folder"),
        ("x" * 5000, "missing: xxx"),
        ("m.safetensors.index.json", "is an index"),
    ],
)
def test_an_index_that_names_what_is_no_shard(tmp_path, name, match):
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    save_file(TENSORS, tmp_path / "x.safetensors")
    refused(write_index(folder, {"a.weight": name}), match)


def test_shards_in_folders_and_behind_links(tmp_path):
    """As the hub's cache has them: the names in a snapshot are links to files beside it."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir(), (snapshot / "part").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0a")
    save_file({"b": torch.zeros(3)}, snapshot / "part" / "2.safetensors")
    (snapshot / "1.safetensors").symlink_to("../../blobs/0a")
    write_index(snapshot, {"a": "1.safetensors", "b": "part/2.safetensors"}, bom=True)
    source = open_source(snapshot)
    assert torch.equal(source.read("a"), torch.ones(2)) and torch.equal(source.read("b"), torch.zeros(3))


# Hidden files, and configurations


def test_files_of_macos_are_passed_over(tmp_path):
    """It puts a `._NAME` beside each NAME on disks of other systems."""
    for name in ("transformer/model.safetensors", "vae.safetensors", "t5.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(TENSORS, tmp_path / name)
        (tmp_path / name).with_name("._" + name.rpartition("/")[2]).write_bytes(b"\0\5\x16\7" + b"\0" * 60)
    folder = tmp_path / "transformer"
    (folder / "._model.safetensors.index.json").write_bytes(b"\0\5\x16\7")
    assert set(open_source(folder).keys()) == set(TENSORS)
    assert size_of(folder) == (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").unlink()
    assert "found nothing" in refused(folder, "no weight files")

    official = tmp_path / "official"
    official.mkdir()
    (official / "google" / "umt5-xxl").mkdir(parents=True)
    files = load_task("t2v-1.3B").files
    for name in (f"{files.tokenizer}/tokenizer.json", files.t5, files.vae, "anything.safetensors"):
        (official / name).touch()
        (official / name).with_name("._" + name.rpartition("/")[2]).touch()
    assert locate(official, load_task("t2v-1.3B")).dit == {"model": [official / "anything.safetensors"]}


def test_a_configuration_with_a_byte_order_mark(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text('{"dim": 64, "num_heads": 2}', encoding="utf-8-sig")
    assert told_heads(open_source(tmp_path), 64) == 2


@pytest.mark.parametrize(
    "text, match",
    [("{", "not a JSON file"), ("[" * 100_000, "nested too deeply"), ("[1]", "no JSON object"), ("\xff", "JSON")],
)
def test_a_configuration_that_cannot_be_read_is_said(tmp_path, text, match):
    save_file(TENSORS, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SwanError, match=f"config.json: .*{match}"):
        config_beside(open_source(tmp_path))


@pytest.mark.parametrize("heads", ['"2"', "0.5", "-2", "3", "[]", "true", "1e999"])
def test_a_configuration_with_impossible_heads(tmp_path, heads):
    save_file(TENSORS, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(f'{{"dim": 64, "num_heads": {heads}}}')
    with pytest.raises(SwanError, match="config.json: num_heads is"):
        told_heads(open_source(tmp_path), 64)


# PyTorch checkpoints


def test_views_are_read_as_they_are(tmp_path):
    big = torch.arange(24.0).reshape(4, 6)
    tensors = {"turned": big.T, "columns": big[:, 1:3], "rows": big[1:3], "steps": big[::2, ::3], "whole": big}
    tensors |= {"again": big, "one": big[0, 0], "small": torch.ones(1).expand(4)}
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        source = open_source(tmp_path / "x.pth")
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor) and source.read(name).is_contiguous()
            if tensor.dim() and len(tensor) > 1:
                assert torch.equal(source.read(name, (1, 2)), tensor[1:2])
        out = torch.zeros(2, 6)
        assert source.read_into("rows", out) and torch.equal(out, big[1:3])
        assert not source.read_into("turned", torch.zeros(6, 4))


def test_parameters_and_tensors_with_attributes(tmp_path):
    tensor = torch.ones(3)
    tensor.note = "hello"
    module = torch.nn.Linear(3, 2)
    torch.save({"a": tensor, "b": torch.nn.Parameter(torch.zeros(2))}, tmp_path / "x.pth")
    assert torch.equal(open_source(tmp_path / "x.pth").read("a"), torch.ones(3))
    torch.save(module.state_dict(), tmp_path / "y.pth")
    assert torch.equal(open_source(tmp_path / "y.pth").read("weight"), module.weight)


@pytest.mark.parametrize(
    "tensor, match",
    [
        (lambda: torch.ones(2, device="meta"), "tensor a is without values"),
        (lambda: torch.eye(3).to_sparse(), "tensor a is sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "tensor a is quantised by torch"),
        (lambda: torch.ones(1).expand(30_000, 30_000), "its tensors would take 3,600,000,008 bytes"),
        (lambda: torch.ones(1).expand(10**7, 10**7), "would take 400,000,000,000,008 bytes"),
    ],
)
def test_tensors_that_are_no_plain_memory(tmp_path, tensor, match):
    torch.save({"a": tensor(), "b": torch.ones(2)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", match)


def test_one_shard_spelled_in_two_ways(tmp_path):
    (tmp_path / "sub").mkdir()
    save_file(TENSORS, tmp_path / "sub" / "1.safetensors")
    index = write_index(tmp_path, {"a.weight": "sub//1.safetensors", "b": "./sub/1.safetensors"})
    assert set(open_source(index).keys()) == set(TENSORS)


def test_many_tensors_in_one_storage(tmp_path):
    """Each lies within the file, and all of them do not."""
    big = torch.zeros(10_000)
    torch.save({str(index): big for index in range(50)}, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "views of the same memory")
    torch.save({"shared": big, "tied": big, "a head too": big}, tmp_path / "x.pth")
    assert len(open_source(tmp_path / "x.pth").keys()) == 3


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_every_protocol(tmp_path, protocol, zipped):
    """With what trainers keep beside weights, which is not looked at."""
    beside = {"loss": np.float64(0.5), "at": np.arange(3), "args": argparse.Namespace(lr=1e-4, out=Path("x"))}
    how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save({"state_dict": TENSORS, **beside, "rest": {"c": beside}}, tmp_path / "x.pth", **how)
    source = open_source(tmp_path / "x.pth")
    assert set(source.keys()) == set(TENSORS)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


class Call:
    def __init__(self, *made):
        self.made = made

    def __reduce__(self):
        return self.made


def test_nothing_in_a_pickle_takes_memory(tmp_path):
    torch.save({"a": torch.ones(1), "b": Call(bytearray, (2**40,)), "c": OrderedDict()}, tmp_path / "x.pth")
    assert open_source(tmp_path / "x.pth").keys() == ["a"]


def rezipped(path, change, **how):
    """The archive with other records: `change` gets a name and its bytes, None leaves it out."""
    file = io.BytesIO()
    torch.save({"a": torch.arange(1000.0), "b": torch.ones(1000)}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w", **how) as new:
        for name in old.namelist():
            if (data := change(name.partition("/")[2], old.read(name))) is not None:
                new.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda name, data: data[:100] if name == "data/0" else data, "storage of tensor a has 100 bytes"),
        (lambda name, data: None if name == "data/1" else data, "has no storage 1"),
        (lambda name, data: None if name == "data.pkl" else data, "not a PyTorch checkpoint"),
        (lambda name, data: b"big" if name == "byteorder" else data, "another byte order"),
        (lambda name, data: b"\x80\x02" + b"]" * 10**6 + b"." if name == "data.pkl" else data, "much more memory"),
        (
            lambda name, data: b"\x80\x02})" + b"\x85" * 10**5 + b"Ns." if name == "data.pkl" else data,
            "no named tensors",
        ),
        (lambda name, data: b"\x80\x02]r\xff\xff\xff\x7f." if name == "data.pkl" else data, "no named tensors"),
        (lambda name, data: b"\x80\x02X\xff\xff\xff\x7fa." if name == "data.pkl" else data, "a piece of 2,147,483,647"),
    ],
)
def test_archives_with_other_records(tmp_path, change, match):
    refused(rezipped(tmp_path / "x.pth", change), match)


def test_a_compressed_archive(tmp_path):
    path = rezipped(tmp_path / "x.pth", lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed or encrypted; save it again with torch.save")
