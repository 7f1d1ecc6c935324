import argparse
import json
import os
import pickle
import struct
import weakref
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.unit.weight_helpers import DictSource, ShapeSource, golden, manifest
from wan.errors import SwanError
from wan.weights.assign import load_weights
from wan.weights.containers.safetensors_file import REPLACES
from wan.weights.infer import infer_dit_config
from wan.weights.source import open_source

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def refused(path, match):
    """The one line that opening `path` ends in."""
    with pytest.raises(SwanError, match=match) as error:
        open_source(path)
    assert "\n" not in str(error.value) and str(error.value) != ""
    return str(error.value)


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def same(source, tensors):
    return set(source.keys()) == set(tensors) and all(torch.equal(source.read(key), tensors[key]) for key in tensors)


# Reading


def test_safetensors_of_every_type(tmp_path):
    types = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64]
    tensors = {str(one): torch.arange(12).reshape(3, 4).to(one) for one in [*types, torch.bool]}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    source = open_source(tmp_path / "x.safetensors")
    assert set(source.keys()) == set(tensors)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert source.info(name) == (type(source.info(name)))(tuple(tensor.shape), tensor.dtype)
        assert read.dtype == tensor.dtype and torch.equal(read.float(), tensor.float())


def test_a_folder_with_an_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "m-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "m.safetensors.index.json"):
        assert same(open_source(path), {"a": torch.ones(2), "b": torch.zeros(3)})


def test_several_files_without_an_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "block_0.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "non_block.safetensors")
    files = [tmp_path / "block_0.safetensors", tmp_path / "non_block.safetensors"]
    for paths in (tmp_path, files):
        assert same(open_source(paths), {"a": torch.ones(2), "b": torch.zeros(3)})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model": t}])
def test_pth(tmp_path, zipped, wrap):
    path = tmp_path / "x.pth"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=zipped)
    assert same(open_source(path), TENSORS)


def test_content_decides_not_the_suffix(tmp_path):
    save_file(TENSORS, tmp_path / "x.pth")
    torch.save(TENSORS, tmp_path / "y.gguf")
    assert same(open_source(tmp_path / "x.pth"), TENSORS) and same(open_source(tmp_path / "y.gguf"), TENSORS)
    torch.save(TENSORS, tmp_path / "z.safetensors")
    refused(tmp_path / "z.safetensors", "rename it to z.pth")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_what_was_read_survives_its_file(tmp_path, name):
    path = tmp_path / name
    save_file(TENSORS, path) if path.suffix == ".safetensors" else torch.save(TENSORS, path)
    tensor = open_source(path).read("a.weight")
    os.truncate(path, 10)
    assert torch.equal(tensor, TENSORS["a.weight"])


# Refusing


def test_missing_and_empty(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "absent.safetensors", "no such file")
    refused(tmp_path / "empty.safetensors", "empty")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no weight files .*found nothing")
    (tmp_path / "folder" / "readme.md").write_text("hello")
    refused(tmp_path / "folder", "found readme.md")
    refused([], "no weight files were given")


def test_lfs_pointer_and_web_page(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4200000000\n")
    refused(path, r"Git-LFS pointer to a file of 4,200,000,000 bytes")
    for page in (b"<!DOCTYPE html><html>", b"\n <html lang='en'>"):
        path.write_bytes(page)
        refused(path, "web page")


@pytest.mark.parametrize("content", [b"\x00" * 64, b"hello, this is a text file", b"\x89PNG\r\n\x1a\n"])
def test_another_kind_of_file(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path / "x.bin", "not a safetensors, PyTorch or GGUF file")
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", "not a safetensors file|truncated|damaged")


def test_truncated_safetensors_says_both_sizes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    size = path.stat().st_size
    os.truncate(path, size - 5)
    assert f"expected {size:,} bytes, has {size - 5:,}" in refused(path, "truncated")
    os.truncate(path, 40)
    refused(path, "truncated, expected at least [0-9,]+ bytes, has 40")
    os.truncate(path, 3)
    refused(path, "not a safetensors file")


@pytest.mark.parametrize(
    "entry, match",
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "needs 8 bytes, has 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "ends at byte 0 of the data, before it begins at 4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "damaged"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "damaged"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "damaged"),
        ({"dtype": "F32", "shape": [1]}, "damaged"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "begins at byte 4"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}, "needs"),
        ({"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}, "element type F4"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "8 bytes follow"),
        ("text", "damaged"),
    ],
)
def test_damaged_safetensors_headers(tmp_path, entry, match):
    refused(write_safetensors(tmp_path / "x.safetensors", {"t": entry}, b"\0" * 8), match)


def test_safetensors_headers_that_are_no_table(tmp_path):
    path = tmp_path / "x.safetensors"
    refused(write_safetensors(path, b"{not json"), "damaged")
    refused(write_safetensors(path, b"[]"), "damaged")
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    refused(write_safetensors(path, b'{"t":' + entry + b',"t":' + entry + b"}", b"\0" * 4), "duplicate name t")


def test_the_same_tensor_in_two_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "x.fp16.safetensors")
    message = refused(tmp_path, "tensor a is in both")
    assert "x.safetensors" in message and "x.fp16.safetensors" in message


def test_a_file_replaces_what_it_names_of_those_before_it(tmp_path):
    base, own = tmp_path / "base.safetensors", tmp_path / "own.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, base)
    save_file({"a": torch.ones(3), "c": torch.ones(2)}, own, metadata={REPLACES: "a"})
    source = open_source([base, own])
    assert source.read("a").tolist() == [1, 1, 1] and source.info("a").shape == (3,)
    assert source.read("b").tolist() == [0, 0] and sorted(source.keys()) == ["a", "b", "c"]
    with pytest.raises(SwanError, match="tensor a is in both"):
        open_source([own, base])
    save_file({"b": torch.ones(2)}, own, metadata={REPLACES: "a"})
    with pytest.raises(SwanError, match="tensor b is in both"):
        open_source([base, own])


def test_missing_shards_are_named(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    refused(tmp_path, "1 of 2 shards are missing: 2.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}))
    refused(tmp_path, "1 tensors of the index are in no shard: b")
    index.write_text("{}")
    refused(tmp_path, "not a safetensors index")
    (tmp_path / "m.fp16.safetensors.index.json").write_text("{}")
    refused(tmp_path, "several checkpoints")


class Evil:
    def __reduce__(self):
        return os.system, ("touch should_not_exist",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "evil": Evil()}, "x.pth", _use_new_zipfile_serialization=zipped)
    assert "system" in refused(tmp_path / "x.pth", "refused, .* could run code")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    refused(tmp_path / "plain.pth", "refused|damaged")
    assert not (tmp_path / "should_not_exist").exists()


def test_damaged_pth(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(TENSORS, path)
    size = path.stat().st_size
    os.truncate(path, size // 2)
    assert f"{size // 2:,} bytes" in refused(path, "truncated")
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    os.truncate(path, path.stat().st_size // 2)
    refused(path, "damaged or truncated")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "not a PyTorch checkpoint")


def test_pth_without_one_state_dict(tmp_path):
    path = tmp_path / "x.pth"
    for content in ([1, 2], {"a": 1}, {"a": {"b": {"c": torch.ones(1)}}}, torch.ones(2)):
        torch.save(content, path)
        refused(path, "holds no named tensors")
    torch.save({"generator": TENSORS, "critic": TENSORS}, path)
    refused(path, "several state dicts .*generator, critic")


# Filling a model


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.tied = nn.Linear(3, 2)
        self.tied.weight = self.proj.weight
        self.modulation = nn.Parameter(torch.zeros(1, 2))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0, device="cpu"), persistent=False)

    def keep_fp32(self, name):
        return name.startswith("norm.")


def toy(**changes):
    """A model on the meta device and a checkpoint for it, float64 so that every cast is a copy."""
    with torch.device("meta"):
        model = Toy()
    tensors = {
        name: torch.randn(value.shape, dtype=torch.float64) if value.is_floating_point() else torch.arange(2)
        for name, value in model.state_dict().items()
        if name != "tied.weight"
    }
    tensors |= changes
    return model, {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_load_casts_ties_and_places(tmp_path):
    model, tensors = toy()
    assert load_weights(model, DictSource(tensors), "dit", dtype=torch.bfloat16) is model
    assert model.proj.weight.dtype == torch.bfloat16 and model.norm.weight.dtype == torch.float32
    assert model.tied.weight is model.proj.weight
    assert torch.equal(model.proj.weight, tensors["proj.weight"].bfloat16())
    assert torch.equal(model.steps, tensors["steps"]) and torch.equal(model.table, torch.arange(4.0))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_without_a_dtype_the_file_decides():
    model, tensors = toy()
    load_weights(model, DictSource(tensors), "dit")
    assert model.proj.weight.dtype == torch.float64 and model.norm.bias.dtype == torch.float32


@pytest.mark.parametrize("name", ["wan21_t2v", "wan21_i2v", "wan21_flf2v", "wan22_i2v", "wan22_ti2v"])
def test_the_transformer_built_from_inferred_shapes_takes_its_weights(name, tmp_path):
    dit = pytest.importorskip("wan.models.dit")
    case = golden(name)
    weights = case.group("weights")
    save_file(weights, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    source = open_source(tmp_path)
    config = infer_dit_config(source)
    assert {key: case.config[key] for key in config if key in case.config}.items() <= config.items()
    with torch.device("meta"):
        model = dit.WanModel(**config)
    load_weights(model, source, "dit", dtype=torch.bfloat16)
    key = "blocks.1.self_attn.o.weight"
    assert torch.equal(model.state_dict()[key], weights[key].bfloat16())


def test_axes_of_size_one_may_be_missing():
    model, tensors = toy(modulation=torch.ones(2))
    load_weights(model, DictSource(tensors), "dit", dtype=torch.float32)
    assert model.modulation.shape == (1, 2)


def test_one_tensor_in_flight(monkeypatch):
    """Where one is as much as may be read ahead."""
    monkeypatch.setattr("wan.weights.in_turn.AHEAD_BYTES", 1)

    class Watching(DictSource):
        last = None

        def read(self, name, rows=None):
            assert self.last is None or self.last() is None, "the tensor read before is still in memory"
            tensor = super().read(name, rows)
            self.last = weakref.ref(tensor)
            return tensor

    model, tensors = toy(steps=torch.zeros(2, dtype=torch.int32))
    load_weights(model, Watching(tensors), "dit", dtype=torch.bfloat16)


def test_everything_that_does_not_fit_is_in_one_line():
    changes = {"norm.bias": None, "extra.weight": torch.ones(1), "proj.bias": torch.ones(5)}
    model, tensors = toy(**changes)
    with pytest.raises(SwanError) as error:
        load_weights(model, DictSource(tensors), "dit")
    message = str(error.value)
    assert "memory.safetensors: does not fit Toy" in message and "\n" not in message
    assert "1 missing (norm.bias)" in message and "1 unexpected (extra.weight)" in message
    assert "1 mis-shaped (proj.bias [5] for [2])" in message
    assert all(parameter.is_meta for parameter in model.parameters()), "nothing is read before the check"


def test_long_lists_are_cut_and_the_file_is_recognised():
    model, _ = toy()
    with pytest.raises(SwanError, match=r"7 missing \(.*, \.\.\.\); 194 unexpected .*looks like a Wan2.1 VAE"):
        load_weights(model, ShapeSource(manifest("vae2.1")), "dit")


def test_integers_are_no_weights():
    model, tensors = toy(**{"proj.weight": torch.zeros(2, 3, dtype=torch.int8)})
    with pytest.raises(SwanError, match="proj.weight int8 for a float"):
        load_weights(model, DictSource(tensors), "dit")


def test_a_buffer_without_values_is_a_bug_of_the_model():
    model, tensors = toy()
    model.register_buffer("lost", torch.zeros(1, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="lost"):
        load_weights(model, DictSource(tensors), "dit")


def test_a_released_vae_layout_loads_from_diffusers_names(tmp_path):
    """A whole VAE through a diffusers file: the tensors arrive under their official names."""
    diffusers = pytest.importorskip("diffusers")
    vae_module = pytest.importorskip("wan.models.vae")
    case = golden("vae_wan21")
    config = case.config
    theirs = diffusers.AutoencoderKLWan(
        base_dim=config["dim"], z_dim=config["z_dim"], dim_mult=list(config["dim_mult"]), num_res_blocks=2
    )
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, path)
    with torch.device("meta"):
        model = vae_module.WanVAE(
            version="2.1",
            dim=config["dim"],
            z_dim=config["z_dim"],
            dim_mult=list(config["dim_mult"]),
            num_res_blocks=2,
            temporal_downsample=[False, True, True],
        )
    load_weights(model, open_source(path), "vae", dtype=torch.float32)
    assert torch.equal(model.state_dict()["conv2.weight"], theirs.post_quant_conv.weight)


def test_a_header_whose_length_begins_like_a_pickle_is_one_of_safetensors(tmp_path):
    """640 is 80 02, which opens a pickle of protocol 2 as well."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(640)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert open_source(tmp_path / "a.safetensors").read("a").tolist() == [0.0]


@pytest.mark.parametrize("wrapped", ["state_dict", "model", "both"])
def test_a_state_dict_with_tensors_beside_it(tmp_path, wrapped):
    weights = {"x.weight": torch.ones(2, 2), "x.bias": torch.zeros(2)}
    content = {"state_dict": {"model": weights}} if wrapped == "both" else {wrapped: weights}
    torch.save(content | ({} if wrapped == "both" else {"step": torch.tensor(5)}), tmp_path / "a.pth")
    assert open_source(tmp_path / "a.pth").keys() == list(weights)


def test_what_trainers_leave_beside_an_adapter_is_not_weights(tmp_path):
    torch.save({"a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.bin")
    torch.save(argparse.Namespace(rate=1), tmp_path / "training_args.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    assert open_source(tmp_path).keys() == ["a.lora_A.weight"]
