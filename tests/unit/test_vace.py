"""VACE: the same numbers however its weights are stored, streamed or changed by LoRAs, and whatever is cached."""

import itertools

import pytest
import torch
from safetensors.torch import save_file
from wan.cache.options import check_options, make_manager

from tests.unit.tiny_checkpoint import dit_state, shrunk
from tests.unit.weight_helpers import DictSource
from wan.conditioning.vace import VaceCondition, mask_channels, vace_condition
from wan.denoise import denoise
from wan.errors import SwanError
from wan.memory.experts import load_expert
from wan.memory.offload import Streamed
from wan.models.dit import WanModel
from wan.quant.linear import QuantLinear
from wan.solvers import make_solver
from wan.weights.infer import check_dit, infer_dit_config
from wan.weights.lora import open_lora, set_loras, weight_shapes
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf
from wan.weights.write.folder import Form, export_folder

SPEC = shrunk("vace-1.3B")
SPEC.dit.update(dim=64, ffn_dim=96)
CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in several forms."""
    folder = tmp_path_factory.mktemp("vace")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(dit_state(SPEC), folder / "fp32.safetensors")
    source = open_source(folder / "fp32.safetensors")
    export_gguf(source, folder / "q8.gguf", "Q8_0")
    for name, form in (("fp8", Form("fp8", torch.float32)), ("mlx", Form("mlx", torch.float32, 4, 32))):
        export_folder({"dit": source}, folder / name, form, copies={}, config={})
    return folder


def on_meta():
    with torch.device("meta"):
        return WanModel(**SPEC.dit)


def load(path, packed=False, **options):
    source = open_source(path)
    options = {"device": CPU, "compute_device": CPU, "dtype": torch.float32} | options
    return load_expert(on_meta(), source, packed=packed, **options)


@torch.inference_mode()
def predict(model):
    inputs = {"vace_context": noise(1, 96, 2, 4, 6, seed=1), "vace_context_scale": 0.9}
    x, text = noise(1, 16, 2, 4, 6), [noise(5, SPEC.dit.text_dim, seed=2)]
    return torch.cat([model(x, torch.tensor([t]), text, **inputs) for t in (900, 30)])


# Files


def test_what_a_file_holds_is_told_from_its_tensors(files):
    for name in ("fp32.safetensors", "q8.gguf", "fp8", "mlx"):
        source = open_source(files / name)
        config = infer_dit_config(source)
        assert (config["vace_layers"], config["vace_in_dim"]) == ([0, 2], 96)
        check_dit(source, SPEC)


@pytest.mark.parametrize("name", ["q8.gguf", "fp8", "mlx"])
def test_packed_is_dequantised(files, name):
    packed = load(files / name, packed=True)
    kinds = {
        path.split(".")[2]: type(module) is QuantLinear
        for path, module in packed.vace_blocks[0].named_modules(prefix="vace_blocks.0")
        if hasattr(module, "in_features")
    }
    assert kinds["self_attn"] and kinds["ffn"]
    assert torch.equal(predict(packed), predict(load(files / name)))


def test_a_gguf_file_without_a_part_of_the_branch_is_refused(tmp_path):
    state = dit_state(SPEC)
    del state["vace_blocks.1.ffn.2.weight"]
    with pytest.raises(SwanError, match=r"incomplete, vace_block 1 has no ffn\.2\.weight \(1 of its"):
        export_gguf(DictSource(state), tmp_path / "a.gguf", "Q8_0")


def test_branch_and_base_may_lie_in_two_files(files, tmp_path):
    """As they are shared for ComfyUI."""
    source = open_source(files / "fp32.safetensors")
    for name in ("base", "branch"):
        keys = [key for key in source.keys() if key.startswith("vace_") == (name == "branch")]
        save_file({key: source.read(key) for key in keys}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "base.safetensors", tmp_path / "branch.safetensors"]
    assert torch.equal(predict(load(paths)), predict(load(files / "fp32.safetensors")))


@pytest.mark.parametrize("ops", ["cpu", "gpu", "reference", None])
def test_it_runs_on_the_meta_device(ops):
    """Which has the memory plan see what a device would compute, by that device's chains."""
    with torch.device("meta"), torch.inference_mode():
        model = WanModel(**SPEC.dit, ops=ops).to(torch.bfloat16)
        inputs = {"vace_context": torch.empty(1, 96, 2, 4, 6), "vace_context_scale": 1.0}
        out = model(torch.empty(1, 16, 2, 4, 6), torch.tensor([5], device="cpu"), torch.empty(1, 5, 32), **inputs)
    assert out.shape == (1, 16, 2, 4, 6) and out.is_meta


# LoRAs

MODULES = ("blocks.1.self_attn.q", "vace_blocks.0.self_attn.q", "vace_blocks.1.ffn.0", "vace_blocks.0.before_proj")
DIALECTS = {
    "comfy": lambda name: f"diffusion_model.{name}",
    "bare": lambda name: name,
    "kohya": lambda name: "lora_unet_" + name.replace(".", "_"),
    "diffusers": lambda name: (
        "transformer."
        + name.replace("self_attn.q", "attn1.to_q").replace("ffn.0", "ffn.net.0.proj").replace("before_proj", "proj_in")
    ),
}


def lora(path, dialect):
    tensors, shapes = {}, weight_shapes(on_meta())
    for seed, name in enumerate(MODULES):
        rows, columns = shapes[f"{name}.weight"]
        tensors[f"{DIALECTS[dialect](name)}.lora_down.weight"] = noise(4, columns, seed=seed)
        tensors[f"{DIALECTS[dialect](name)}.lora_up.weight"] = noise(rows, 4, seed=seed + 9)
    save_file(tensors, path)
    return open_lora(path, shapes)


def test_loras_reach_the_branch_under_all_names(files, tmp_path):
    outs = []
    for dialect in DIALECTS:
        opened = lora(tmp_path / f"{dialect}.safetensors", dialect)
        assert set(opened.updates) == {f"{name}.weight" for name in MODULES} and not opened.notes
        outs.append(predict(load(files / "fp32.safetensors", loras=[(opened, 0.5)])))
    plain = predict(load(files / "fp32.safetensors"))
    assert all(torch.equal(out, outs[0]) for out in outs) and not torch.equal(outs[0], plain)


@pytest.mark.parametrize("name, packed", [("fp32.safetensors", False), ("q8.gguf", True)])
def test_removed_loras_leave_nothing(files, tmp_path, name, packed):
    model, source = load(files / name, packed), open_source(files / name)
    set_loras(model, source, [(lora(tmp_path / "a.safetensors", "comfy"), 1)])
    assert not torch.equal(predict(model), predict(load(files / name, packed)))
    set_loras(model, source, [])
    assert torch.equal(predict(model), predict(load(files / name, packed)))


# Streaming

WAYS = [
    {"granularity": granularity, "blocks_from": place, "resident_blocks": resident}
    for granularity, place, resident in itertools.product(["block", "phase"], ["ram", "disk"], [(), (1, 4)])
]


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("name, packed", [("fp32.safetensors", False), ("q8.gguf", True), ("fp8", True), ("mlx", True)])
def test_streamed_is_resident_bit_for_bit(files, tmp_path, name, packed, has_lora):
    loras = [(lora(tmp_path / "a.safetensors", "comfy"), 0.7)] if has_lora else []
    wanted = predict(load(files / name, packed, loras=loras))
    for way in WAYS:
        model = load(files / name, packed, loras=loras, **way)
        assert isinstance(model.offload, Streamed)
        with model.offload.hold(model.vace_blocks[0]), model.offload.hold(model.vace_blocks[0].after_proj):
            assert not model.vace_blocks[0].after_proj.bias.is_meta
        assert torch.equal(predict(model), wanted), way
        model.offload.close()


# Sampling


@torch.inference_mode()
def sample(model, condition, manager=None):
    cached = {} if manager is None else {"cache": manager}

    def network(latent, times, ctx):
        text = [noise(5, SPEC.dit.text_dim, seed=2 if ctx.branch == "cond" else 3)]
        return model(latent, times, text, **condition.inputs(ctx), **({"ctx": ctx} | cached if cached else {}))

    start = noise(1, 16, 2 + condition.extra_frames, 4, 6)
    solver = make_solver("unipc", steps=6, shift=5.0)
    return denoise(network, solver, start, guide_scale=3.0, condition=condition, **cached)


@pytest.mark.parametrize("threshold, skips", [(0, False), (1e9, True)])
def test_a_cache_of_threshold_zero_changes_no_bit(files, threshold, skips):
    model = load(files / "fp32.safetensors")
    condition = VaceCondition(noise(1, 96, 3, 4, 6, seed=1), 0.9, 1)
    flags = {"fbcache": True, "fb_thresh": threshold, "fb_warmup": 1, "fb_last_steps": 1, "cache_force": True}
    manager = make_manager(check_options(flags, 6)[0], {})
    out = sample(model, condition, manager)
    assert any(one.skipped for one in manager.telemetry.decisions) == skips
    assert torch.equal(out, sample(model, condition)) != skips


# The condition


def test_what_is_replaced_is_told_from_what_is_kept():
    seen = []

    def encode(video):
        seen.append(video)
        return torch.full((1, 2, (video.shape[2] - 1) // 4 + 1, 2, 3), float(len(seen)))

    frames, mask = noise(3, 9, 16, 24), torch.zeros(1, 9, 16, 24)
    mask[..., :12] = 0.8  # a soft mask is soft in its channels alone
    mask[..., 12:] = 0.3
    picture = noise(3, 1, 16, 24, seed=1)
    condition = vace_condition(encode, frames, mask, [picture, -picture], context_scale=0.5)
    kept, replaced, *pictures = seen
    assert (kept[..., :12] == 0).all() and torch.equal(kept[0, ..., 12:], frames[..., 12:])
    assert (replaced[..., 12:] == 0).all() and torch.equal(replaced[0, ..., :12], frames[..., :12])
    assert torch.equal(pictures[0][0], picture) and torch.equal(pictures[1][0], -picture)
    assert condition.context.shape == (1, 2 + 2 + 64, 2 + 3, 2, 3) and condition.extra_frames == 2
    first = condition.context[0, :, 0, 0]
    assert first[:2].unique().tolist() == [3] and (first[2:] == 0).all()
    video = condition.context[0, :, 2:]
    assert video[:2].unique().tolist() == [1] and video[2:4].unique().tolist() == [2]
    assert torch.equal(video[4:, 0, 0, 0], torch.full((64,), 0.8))
    assert torch.equal(video[4:, 0, 0, 1], torch.tensor([0.8] * 4 + [0.3] * 4).repeat(8))
    given = condition.inputs(None)
    assert given["vace_context"] is condition.context and given["vace_context_scale"] == 0.5


def test_the_mask_takes_frames_by_their_centres():
    mask = torch.arange(81.0)[None, :, None, None].expand(1, 81, 8, 8)  # the first three are 1, 5, 9
    assert mask_channels(mask, 1, 1)[0, :, 0, 0].tolist() == [int((index + 0.5) * 81 / 21) for index in range(21)]
    one = torch.ones(1, 1, 8, 8)
    assert mask_channels(one, 1, 1).shape == (64, 1, 1, 1)
