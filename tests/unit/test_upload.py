"""Weights on their way from a file to a device: every byte arrives, and none is used too early or overwritten."""

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.simulated_device import SimulatedDevice
from tests.unit.test_dit import SHAPE
from tests.unit.weight_helpers import DictSource
from wan.memory.upload import Upload
from wan.models.dit import WanModel
from wan.quant.linear import QuantLinear
from wan.weights.assign import ModelWeights, load_weights
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf
from wan.weights.write.folder import Form, export_folder

SIZES = SHAPE | {"dim": 64, "ffn_dim": 96, "num_layers": 2}


def brought(sizes, forget=(), pieces=2):
    """The operations of a device to which runs of bytes are brought, each used when it is there."""
    device = SimulatedDevice(forget)
    upload = Upload(device, "cpu", 64, pieces)
    for number, size in enumerate(sizes):

        def read(first, out, number=number):
            device.fill(number, out)
            return True

        slot = upload.bring(size, read)
        assert slot.eq(number + 1).all() and len(slot) == size
        device.compute(slot, number)
    return device


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_nothing_is_overwritten_before_it_is_copied(pieces):
    assert brought([10, 64, 65, 1, 300, 0, 128], pieces=pieces).races() == []


@pytest.mark.parametrize("guarantee", ["copy is complete", "memory is free", "pinned buffer is free"])
def test_each_wait_is_needed(guarantee):
    assert brought([64, 300, 128], [guarantee]).races()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    state = {name: one.bfloat16() for name, one in WanModel(**SIZES).state_dict().items()}
    save_file(state, folder / "safetensors")
    turned = "blocks.0.ffn.0.weight"  # is not in one piece
    torch.save(state | {turned: state[turned].t().contiguous().t()}, folder / "pth")
    export_gguf(DictSource(state), folder / "gguf", "Q8_0")
    export_folder({"dit": DictSource(state)}, folder / "out", Form("fp8"), config={})
    (folder / "out" / "diffusion_pytorch_model.safetensors").rename(folder / "fp8")
    return folder


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["safetensors", "pth", "gguf", "fp8"])
def test_a_model_that_is_filled_through_it(files, name, stream):
    source, models = open_source(files / name), []
    for upload in (None, Upload(SimulatedDevice(), "cpu", 1000)):
        with torch.device("meta"):
            model = WanModel(**SIZES)
        load_weights(model, source, "dit", dtype=torch.float32, stream=stream, upload=upload)
        models.append(model)
    assert any(isinstance(one, QuantLinear) for one in models[1].modules()) == (stream and name in ("gguf", "fp8"))
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_weight_that_is_changed_as_it_arrives(files):
    with torch.device("meta"):
        model = WanModel(**SIZES)
    weights = ModelWeights(model, open_source(files / "safetensors"), "dit", dtype=torch.float32)

    def change(name, stored, rows, held):
        return held.float() + 1 if name == "head.head.weight" else None

    weights.fill("cpu", change, Upload(SimulatedDevice(), "cpu", 1000))
    stored = open_source(files / "safetensors").read("head.head.weight").float()
    assert torch.equal(model.head.head.weight, stored + 1)
