"""Weights that are streamed: nothing is used too early or overwritten too late, and no bit of a result changes."""

import itertools
import random
import threading

import pytest
import torch
from safetensors.torch import save_file
from wan.cache import StepContext
from wan.cache.options import check_options, make_manager

from tests.unit.simulated_device import SimulatedDevice
from tests.unit.test_dit import SHAPE, latents, make, texts
from tests.unit.tiny_checkpoint import shrunk, t5_state, write_tokenizer
from tests.unit.weight_helpers import DictSource
from wan.memory.experts import load_expert
from wan.memory.offload import Cpu, Ring, Streamed, streamed_modules
from wan.models.dit import WanModel
from wan.models.encoders import load_text_encoder
from wan.plan import resident_indices
from wan.quant.linear import QuantLinear
from wan.weights.lora import open_lora, set_loras, weight_shapes
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf
from wan.weights.write.folder import Form, export_folder

CPU = torch.device("cpu")
SIZES = SHAPE | {"dim": 64, "ffn_dim": 96, "num_layers": 5}


# The ring


def walk(ring, device, order):
    for unit in order:
        with ring.hold(unit) as slot:
            device.compute(slot, unit)
    ring.close()


def orders(count):
    """In turn, some left out, back to the first one at any time, as caches make it, and at random."""
    rng = random.Random(count)
    yield [*range(count)] * 3
    yield [*range(count), 0, 0, 0, *range(count), 0, *range(count)]
    yield [*range(0, count, 2), *range(count)]
    yield [rng.randrange(count) for _ in range(40)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("slots", [2, 3])
def test_nothing_is_read_before_it_is_copied_or_overwritten_in_use(count, slots):
    for order in orders(count):
        device = SimulatedDevice()
        walk(Ring(device, count, 64, device.fill, slots), device, order)
        used = [one.unit for one in device.operations if one.lane == "compute" and one.reads is not None]
        assert used == order and device.races() == []


@pytest.mark.parametrize("guarantee", ["copy is complete", "slot is free", "memory is free", "pinned buffer is free"])
def test_each_wait_is_needed(guarantee):
    device = SimulatedDevice(forget=[guarantee])
    walk(Ring(device, 5, 64, device.fill), device, [*range(5)] * 2)
    assert device.races()


def test_units_are_read_once_a_round_and_not_at_all_where_all_fit():
    for slots, count, wanted in ((2, 7, 3 * 7), (3, 7, 3 * 7), (2, 2, 2), (3, 2, 2), (2, 1, 1)):
        device = SimulatedDevice()
        ring = Ring(device, count, 64, device.fill, slots)
        for unit in [*range(count)] * 3:
            with ring.hold(unit):
                pass
        ring.close()
        assert wanted <= ring.units_read <= wanted + slots - 1  # and those that were sent for ahead


def test_the_next_unit_is_on_its_way_while_one_computes():
    arrived = threading.Event()

    def fill(unit, buffer):
        if unit == 1:
            arrived.set()

    ring = Ring(Cpu(), 4, 64, fill)
    with ring.hold(0):
        assert arrived.wait(10)
    ring.close()


def test_a_unit_that_cannot_be_read_is_an_error_where_it_is_needed_and_can_be_tried_again():
    broken = {1}

    def fill(unit, buffer):
        if unit in broken:
            raise OSError("gone")
        buffer.fill_(unit)

    ring = Ring(Cpu(), 3, 8, fill)
    with ring.hold(0):
        pass
    with pytest.raises(OSError, match="gone"), ring.hold(1):
        pass
    broken.clear()
    with ring.hold(1) as slot:
        assert slot.eq(1).all()
    ring.close()


def test_what_changed_is_read_again():
    value = itertools.count(1)
    ring = Ring(Cpu(), 2, 8, lambda unit, buffer: buffer.fill_(next(value)))
    with ring.hold(0) as slot:
        assert slot[0] == 1
    ring.forget()
    with ring.hold(0) as slot:
        assert slot[0] == 3
    ring.close()


def test_resident_blocks_are_spread():
    assert resident_indices(40, 0) == set() and resident_indices(5, 5) == set(range(5))
    for count, resident in ((40, 13), (30, 1), (30, 29), (6, 3)):
        chosen = sorted(resident_indices(count, resident))
        assert len(chosen) == resident and 0 <= chosen[0] and chosen[-1] < count
        gaps = [late - early for early, late in itertools.pairwise([chosen[-1] - count, *chosen])]
        assert max(gaps) - min(gaps) <= 1


# The model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in every form, by name."""
    folder = tmp_path_factory.mktemp("weights")
    state = {name: one.detach().contiguous() for name, one in make(**SIZES).state_dict().items()}
    save_file(state, folder / "fp32.safetensors")
    save_file({name: one.bfloat16() for name, one in state.items()}, folder / "bf16.safetensors")
    source = open_source(folder / "fp32.safetensors")
    export_gguf(source, folder / "q8.gguf", "Q8_0")
    for name, form in (("fp8", Form("fp8", torch.float32)), ("int8", Form("int8", torch.float32))):
        export_folder({"dit": source}, folder / name, form, copies={}, config={})
    export_folder({"dit": source}, folder / "mlx", Form("mlx", torch.float32, 4, 32), copies={}, config={})
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer, rows, columns in (("self_attn.q", 64, 64), ("cross_attn.o", 64, 64), ("ffn.0", 96, 64)):
        for block in range(5):
            key = f"diffusion_model.blocks.{block}.{layer}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
            tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, path)
    with torch.device("meta"):
        shapes = weight_shapes(WanModel(**SIZES))
    return open_lora(path, shapes)


def load(path, dtype=torch.float32, packed=False, device=CPU, **options):
    with torch.device("meta"):
        model = WanModel(**SIZES)
    source = open_source(path)
    resident = resident_indices(5, options.pop("resident_blocks", 0))
    options |= {"resident_blocks": resident}
    return load_expert(model, source, device=device, compute_device=device, dtype=dtype, packed=packed, **options)


@torch.inference_mode()
def predict(model):
    device = model.patch_embedding.weight.device
    x, text = torch.stack(latents((2, 4, 6))).to(device), [one.to(device) for one in texts(7)]
    return torch.cat([model(x, torch.tensor([time]), text) for time in (900, 500)])


WAYS = [
    {"granularity": granularity, "blocks_from": place, "resident_blocks": resident}
    for granularity, place, resident in [
        *itertools.product(["block", "phase"], ["ram", "disk"], [0]),
        ("block", "disk", 2),
        ("phase", "ram", 3),
        ("block", "ram", 4),
    ]
]
STORED = {
    "fp32": ("fp32.safetensors", {}),
    "bf16": ("bf16.safetensors", {"dtype": torch.bfloat16}),
    "bf16 from fp32": ("fp32.safetensors", {"dtype": torch.bfloat16}),
    "gguf": ("q8.gguf", {"packed": True}),
    "gguf in bf16": ("q8.gguf", {"packed": True, "dtype": torch.bfloat16}),
    "gguf dequantised": ("q8.gguf", {}),
    "fp8": ("fp8", {"packed": True}),
    "int8": ("int8", {"packed": True, "dtype": torch.bfloat16}),
    "mlx": ("mlx", {"packed": True}),
}


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_streamed_is_resident_bit_for_bit(files, lora, stored, has_lora):
    name, options = STORED[stored]
    loras = [(lora, 0.7)] if has_lora else []
    wanted = predict(load(files / name, loras=loras, **options))
    for way in WAYS:
        model = load(files / name, loras=loras, **options, **way)
        assert isinstance(model.offload, Streamed)
        assert torch.equal(predict(model), wanted), way
        model.offload.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("stored", ["bf16", "gguf in bf16", "int8"])
def test_streamed_to_a_gpu_is_resident_there_bit_for_bit(files, lora, stored, has_lora):
    name, options = STORED[stored]
    options = options | {"device": torch.device("cuda"), "loras": [(lora, 0.7)] if has_lora else []}
    wanted = predict(load(files / name, **options))
    for way in WAYS:
        model = load(files / name, **options, **way)
        for _ in range(5):
            assert torch.equal(predict(model), wanted), way
        model.offload.close()


def test_what_travels_and_what_stays(files):
    model = load(files / "q8.gguf", packed=True, granularity="block", blocks_from="disk", resident_blocks=1)
    [stays] = resident_indices(5, 1)
    unread = {name for name, one in model.named_parameters() if one.is_meta}
    assert unread and all(one.startswith("blocks.") and not one.startswith(f"blocks.{stays}.") for one in unread)
    assert {len(model.get_parameter(name).shape) for name in unread} == {2}
    layers = [one for one in model.blocks.modules() if isinstance(one, QuantLinear)]
    assert len(layers) == 5 * 10 and len(unread) == 4 * 10
    whole = sum(one.blocks.numel() for one in model.blocks[0].modules() if isinstance(one, QuantLinear))
    assert whole <= model.offload.size_bytes <= whole + 10 * 256
    predict(model)
    assert {name for name, one in model.named_parameters() if one.is_meta} == unread  # at rest as before
    parts = load(files / "q8.gguf", packed=True, granularity="phase", blocks_from="disk")
    assert parts.offload.size_bytes < 0.5 * model.offload.size_bytes
    for one in (model, parts):
        one.offload.close()


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("name, packed", [("fp32.safetensors", False), ("q8.gguf", True)])
def test_loras_change_while_streaming(files, lora, place, name, packed):
    source = open_source(files / name)
    base, changed = (predict(load(files / name, packed=packed, loras=one)) for one in ([], [(lora, 1.0)]))
    model = load(files / name, packed=packed, granularity="block", blocks_from=place)
    for loras, wanted in (([], base), ([(lora, 1.0)], changed), ([], base)):
        set_loras(model, source, loras, CPU)
        model.offload.forget()
        assert torch.equal(predict(model), wanted)
    model.offload.close()


@pytest.mark.parametrize("flags", [{"fbcache": True, "fb_thresh": 0.2}, {"teacache": True, "teacache_thresh": 3.0}])
def test_a_cache_that_leaves_out_blocks(files, flags):
    steps = [StepContext(i, 6, 900.0 - 100 * i, 0.9 - 0.1 * i, "model", "cond", 0) for i in range(6)]

    def run(model):
        options, _ = check_options(flags | {"cache_force": True}, len(steps))
        manager = make_manager(options, {}, None)
        x, text = torch.stack(latents((2, 4, 6))), texts(7)
        with torch.inference_mode(), manager.run(steps):
            out = [model(x, torch.tensor([ctx.timestep]), text, cache=manager, ctx=ctx) for ctx in steps]
        return torch.cat(out), [one.skipped for one in manager.telemetry.decisions]

    wanted, decisions = run(load(files / "fp32.safetensors"))
    assert len(set(decisions)) == 2
    for way in WAYS[:4]:
        model = load(files / "fp32.safetensors", **way)
        got, same = run(model)
        assert torch.equal(got, wanted) and same == decisions
        model.offload.close()


def test_units_in_the_order_of_use(files):
    model = load(files / "fp32.safetensors")
    paths = list(streamed_modules(model.units(), "phase", ()))
    assert paths[:4] == ["blocks.0.self_attn", "blocks.0.cross_attn", "blocks.0.ffn", "blocks.1.self_attn"]
    assert streamed_modules(model.units(), "block", range(5)) == {}


# The text encoder


@pytest.mark.parametrize("packed", [False, True])
def test_layers_of_the_text_encoder_come_one_by_one(tmp_path, packed):
    spec = shrunk("t2v-1.3B")
    write_tokenizer(tmp_path)
    source = DictSource(t5_state(spec))
    if packed:
        export_gguf(source, tmp_path / "t5.gguf", "Q8_0")
        source = open_source(tmp_path / "t5.gguf")
    found = []
    for device in (None, "cpu"):
        with torch.inference_mode():
            encoder = load_text_encoder(
                source, tmp_path, text_len=32, dtype=torch.bfloat16, stream=packed, stream_to=device
            )
            found += [encoder(["a red cat", "b"]), encoder(["a red cat", "b"])]
    assert all(one.is_meta for one in encoder.parameters())  # at rest
    assert all(torch.equal(one, wanted) for texts in found for one, wanted in zip(texts, found[0], strict=True))
