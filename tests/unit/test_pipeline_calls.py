"""A pipeline that is called again: with what it was not built for, and after a run that was cut short."""

import gc
import threading
import weakref

import pytest
import torch

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.errors import UsageError
from wan.finite import NotFinite
from wan.models.dit import WanModel
from wan.options import build_request
from wan.pipeline import WanPipeline
from wan.tasks import REPO, load_task

TINY = REPO / "wan/assets/tiny"
LORA = str(TINY / "loras/stripes.safetensors")
DIT = str(TINY / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def request_of(tmp_path):
    """request_of(**options) -> a request for a quick video of t2v-tiny, unless they say otherwise."""

    def of(**options):
        quick = {"frame_num": 5, "sample_steps": 3, "size": "32*32", "seed": 1, "device": "cpu"}
        return build_request(quick | {"save_file": str(tmp_path / "a.mp4")} | options)

    return of


def built(request):
    return WanPipeline.from_request(request, load_task(request.load.task))


# (option as a message names it, options of the request)
OTHERS = [
    ("dtype", {"dtype": "bf16"}),
    ("t5_dtype", {"t5_dtype": "bf16"}),
    ("vae_dtype", {"vae_dtype": "bf16"}),
    ("dit", {"dit": DIT}),
    ("offload", {"offload": "block"}),
    ("offload", {"offload": "none"}),
    ("vae_offload", {"vae_offload": False}),
    ("ram_gb", {"ram_gb": 100}),
    ("gguf_mode", {"gguf_mode": "stream"}),
    ("t5_cpu", {"t5_cpu": True}),
    ("ckpt_dir", {"task": "t2v-tiny", "ckpt_dir": str(TINY.parent / "tiny_i2v")}),
    ("task", {"task": "i2v-tiny"}),
]


@pytest.mark.parametrize("option, options", OTHERS)
def test_a_request_for_other_models_is_refused(request_of, option, options):
    """Before anything is loaded, and the pipeline can be used as before."""
    pipe = built(request_of(offload="model"))
    with pytest.raises(UsageError, match=f"--{option} is ") as caught:
        pipe(request_of(**options))
    assert "\n" not in str(caught.value) and pipe.latents is None and not pipe._models


def test_the_attention_is_part_of_the_models(request_of):
    pipe = built(request_of(dtype="bf16"))
    with pytest.raises(UsageError, match="--attention is flash_attn2 .* auto"):
        pipe(request_of(dtype="bf16").changed(attention="flash_attn2"))


def test_what_is_sampled_may_differ(request_of):
    pipe = built(request_of())
    first = pipe(request_of()).frames
    request = request_of(prompt="a blue square", seed=2, sample_steps=4, size="48*32", frame_num=9, vae_tile_px=64)
    assert pipe(request).frames.shape == (9, 32, 48, 3)
    assert (pipe(request_of()).frames == first).all()


def test_loras_that_were_set_count(request_of):
    pipe = built(request_of(offload="none"))
    pipe.set_loras(LORA)
    latents = pipe(request_of()).latents  # a request that names none takes those of the pipeline
    assert torch.equal(pipe(request_of(lora=[LORA])).latents, latents)
    half = pipe(request_of(lora=[f"{LORA}:0.5"])).latents
    assert not torch.equal(half, latents) and torch.equal(pipe(request_of(lora=[LORA])).latents, latents)


def test_auto_is_the_first_device_that_is_here(request_of):
    assert built(request_of(device="auto")).device.type in ("cpu", "cuda", "mps")


class Cut(Exception):
    pass


def cut_at(stage):
    def progress(now, done, total):
        if (now, done) == (stage, 0 if stage == "decode" else 1):
            raise Cut

    return progress


@pytest.mark.parametrize("error", [Cut, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{"offload": "model"}, {"offload": "block", "resident_blocks": 1}])
def test_a_run_that_is_cut_short_leaves_nothing(request_of, monkeypatch, options, error):
    """No model, ring or thread, even while somebody holds the error; and the next run is as if it had not been."""
    request = request_of(**options)
    wanted = built(request)(request).latents
    pipe, made = built(request), []
    real = pipe.experts._load
    monkeypatch.setattr(pipe.experts, "_load", lambda *args: made.append(weakref.ref(model := real(*args))) or model)

    def progress(stage, done, total):
        if (stage, done) == ("denoise", 1):
            raise error

    before = set(threading.enumerate())
    with pytest.raises(error) as held:
        pipe(request, progress)
    assert len(made) == 1 and made[0]() is None and held.value.__traceback__ is not None
    assert "model" not in pipe.experts and not pipe._models and set(threading.enumerate()) <= before
    assert torch.equal(pipe(request).latents, wanted)


def test_models_that_stay_stay_after_an_error(request_of):
    request = request_of(offload="none")
    pipe = built(request)
    with pytest.raises(Cut):
        pipe(request, cut_at("decode"))
    model = pipe.experts["model"]
    pipe(request)
    assert pipe.experts["model"] is model


def test_the_callers_own_error_is_left_alone(request_of):
    pipe = built(request_of())

    def fail():
        mine = "mine"  # noqa: F841
        raise ValueError

    try:
        fail()
    except ValueError as first:
        with pytest.raises(Cut):
            pipe(request_of(), cut_at("denoise"))
        assert first.__traceback__.tb_next.tb_frame.f_locals == {"mine": "mine"}
    gc.collect()


# Not finite


def spoilt(monkeypatch, step):
    """The network's prediction holds a NaN from its `step`th call on."""
    real, calls = WanModel.forward, []

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs).clone()
        calls.append(1)
        if len(calls) >= step:
            out.view(-1)[-1] = float("nan")
        return out

    monkeypatch.setattr(WanModel, "forward", forward)


def test_the_step_is_told_and_the_latents_are_not_kept(request_of, monkeypatch):
    pipe, steps = built(request_of()), []
    spoilt(monkeypatch, step=5)  # each step calls it twice
    with pytest.raises(NotFinite, match="step 3 of 3"):
        pipe(request_of(), lambda stage, done, total: steps.append((stage, done)))
    assert steps[-1] == ("denoise", 2) and pipe.latents is None


@pytest.mark.parametrize("part, stage", [("clip", "encode_image"), ("vae", "encode_image")])
def test_what_is_made_of_an_image(tmp_path, monkeypatch, part, stage):
    from PIL import Image

    spec = shrunk("i2v-14B")
    write_checkpoint(tmp_path, spec)
    path = tmp_path / spec.files[part]
    state = torch.load(path, weights_only=True)
    state["visual.cls_embedding" if part == "clip" else "encoder.conv1.bias"].view(-1)[0] = float("inf")
    torch.save(state, path)
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    request = build_request(
        {"task": "i2v-14B", "ckpt_dir": str(tmp_path), "prompt": "a", "image": str(tmp_path / "a.png"), "size": "64*32"}
        | {"frame_num": 5, "sample_steps": 1, "device": "cpu", "save_file": str(tmp_path / "a.mp4")}
    )
    with pytest.raises(NotFinite, match=f"{stage}: .*{spec.files[part]}.* --{part}"):
        WanPipeline.from_request(request, spec)(request)
