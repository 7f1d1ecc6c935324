"""The whole pipeline of every kind of task, from files in the official layout to frames, on tiny random weights."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.errors import SwanError
from wan.memory.experts import Experts
from wan.models.dit import WanModel
from wan.models.encoders import TextEncoder
from wan.options import build_request
from wan.pipeline import WanPipeline

# name of the case -> (task, images it starts from)
CASES = {
    "t2v": ("t2v-1.3B", ()),
    "i2v": ("i2v-14B", ("image",)),
    "flf2v": ("flf2v-14B", ("first_frame", "last_frame")),
    "t2v two experts": ("t2v-A14B", ()),
    "i2v two experts": ("i2v-A14B", ("image",)),
    "flf2v two experts": ("i2v-A14B", ("image", "last_frame")),
    "ti2v text": ("ti2v-5B", ()),
    "ti2v image": ("ti2v-5B", ("image",)),
}
WITH_IMAGES = [name for name, (_, images) in CASES.items() if images]
STEPS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(spec, folder) of a task, written once."""
    written = {}

    def of(task):
        if task not in written:
            spec = shrunk(task)
            written[task] = spec, write_checkpoint(tmp_path_factory.mktemp(task), spec)
        return written[task]

    return of


@pytest.fixture
def setup(checkpoint, tmp_path):
    """setup(case, **options) -> (request, spec). Every image flag gets a picture of its own."""

    def build(case, **options):
        task, images = CASES[case]
        spec, folder = checkpoint(task)
        for index, flag in enumerate(images):
            options.setdefault(flag, picture(tmp_path / f"{flag}.png", index))
        defaults = {"prompt": "a red cat", "size": "64x32", "frame_num": 9, "sample_steps": STEPS, "seed": 1}
        machine = {"device": "cpu", "dtype": "fp32", "save_file": str(tmp_path / "a.mp4")}
        return build_request({"task": task, "ckpt_dir": str(folder), **defaults, **machine, **options}), spec

    return build


def picture(path, seed):
    """A random image of the videos' aspect ratio."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@torch.inference_mode()
def make(request, spec, progress=None):
    """The result of a fresh pipeline."""
    return WanPipeline.from_request(request, spec)(request, progress)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_makes_frames(setup, case):
    request, spec = setup(case)
    result = make(request, spec)
    assert result.frames.dtype == np.uint8 and result.frames.shape == (9, 32, 64, 3)
    assert result.frames.std() > 1
    stride = spec.vae_stride[1]
    assert result.latents.dtype == torch.float32
    assert result.latents.shape == (spec.vae.z_dim, 3, 32 // stride, 64 // stride)
    seconds = {"encode", "denoise", "decode", "load", *(["swap"] if "experts" in case else [])}
    assert set(result.seconds) == seconds


@pytest.mark.parametrize("case", CASES)
def test_seed_and_offloading(setup, case):
    """Same seed, same bytes, whether models are let go of after their stage or stay."""
    first = make(*setup(case)).frames
    request, spec = setup(case, offload_model=False)
    pipe = WanPipeline.from_request(request, spec)
    with torch.inference_mode():
        assert np.array_equal(first, pipe(request).frames)
        other = pipe(setup(case, seed=2)[0]).frames
        assert not np.array_equal(first, other)
        assert np.array_equal(first, pipe(request).frames)  # nothing is left over from the run between


@pytest.mark.parametrize("case", ["t2v", "i2v", "ti2v image"])
def test_the_prompt_matters(setup, case):
    first, other = (make(*setup(case, prompt=prompt)).latents for prompt in ("a red cat", "two dogs"))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_every_image_matters(setup, case, tmp_path):
    first = make(*setup(case)).latents
    for flag in CASES[case][1]:
        assert not torch.equal(first, make(*setup(case, **{flag: picture(tmp_path / "other.png", 9)})).latents)


def test_ti2v_keeps_the_image_as_its_first_latent_frame(setup):
    one, two = (make(*setup("ti2v image", seed=seed)).latents for seed in (1, 2))
    assert torch.equal(one[:, 0], two[:, 0]) and not torch.equal(one[:, 1], two[:, 1])


@pytest.fixture
def calls(monkeypatch):
    """Counts the transformer's calls and keeps the texts that are encoded and the experts that are asked for."""
    seen = types.SimpleNamespace(forward=0, texts=[], experts=[])

    def spy(owner, method, note):
        real = getattr(owner, method)

        def call(self, *args, **kwargs):
            note(*args)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, call)

    def count(x, *_):
        seen.forward += not x.is_meta  # where a plan is made

    spy(WanModel, "forward", count)
    spy(TextEncoder, "forward", seen.texts.extend)
    spy(Experts, "__getitem__", seen.experts.append)
    return seen


def test_guidance_needs_both_texts(setup, calls):
    make(*setup("t2v", negative_prompt="blurry"))
    assert calls.forward == 2 * STEPS and calls.texts == ["a red cat", "blurry"]


def test_guidance_1_computes_no_uncond(setup, calls):
    make(*setup("t2v", sample_guide_scale=1, negative_prompt="blurry"))
    assert calls.forward == STEPS and calls.texts == ["a red cat"]


@pytest.mark.parametrize("case", ["t2v two experts", "i2v two experts"])
def test_high_noise_expert_first(setup, calls, case):
    make(*setup(case, sample_guide_scale="2,1", negative_prompt=""))
    high, low = calls.experts.count("high"), calls.experts.count("low")
    assert calls.experts == ["high"] * high + ["low"] * low and high and low
    assert high + low // 2 == STEPS and low % 2 == 0  # guidance is on in the low-noise half only
    assert calls.texts == ["a red cat", ""]


@pytest.mark.parametrize("offload, loads", [(True, ["high", "low"] * 2), (False, ["high", "low"])])
def test_experts_are_loaded_when_needed(setup, monkeypatch, offload, loads):
    loaded = []
    real = WanPipeline._load_expert
    monkeypatch.setattr(WanPipeline, "_load_expert", lambda *args: loaded.append(args[1]) or real(*args))
    request, spec = setup("t2v two experts", offload_model=offload)
    pipe = WanPipeline.from_request(request, spec)
    assert loaded == []
    pipe(request)
    pipe(request)
    assert loaded == loads


def test_progress(setup):
    reports = []
    make(*setup("i2v"), progress=lambda *report: reports.append(report))
    stages = list(dict.fromkeys(stage for stage, _, _ in reports))
    assert stages == ["encode", "load", "denoise", "decode"]  # loading is no part of the first step
    assert reports == sorted(reports, key=lambda report: (stages.index(report[0]), report[1]))  # only onwards
    for stage in stages:
        done, totals = zip(*((done, total) for name, done, total in reports if name == stage))
        assert len(set(totals)) == 1 and done[0] == 0 and done[-1] == totals[0]
    assert {done for stage, done, _ in reports if stage == "denoise"} == set(range(STEPS + 1))


@pytest.mark.parametrize("value, inference", [(None, True), ("1", True), ("0", False)])
def test_autograd_is_off_unless_asked(setup, monkeypatch, value, inference):
    request, spec = setup("t2v")
    pipe = WanPipeline.from_request(request, spec)
    seen = []
    monkeypatch.setattr(pipe, "_run", lambda *_: seen.append(torch.is_inference_mode_enabled()))
    monkeypatch.delenv("WAN_INFERENCE_ONLY", raising=False)
    if value is not None:
        monkeypatch.setenv("WAN_INFERENCE_ONLY", value)
    pipe(request)
    assert seen == [inference]


def test_latents_survive_a_failed_decoder(setup, monkeypatch):
    request, spec = setup("t2v")
    pipe = WanPipeline.from_request(request, spec)
    assert pipe.latents is None
    with torch.inference_mode():
        result = pipe(request)
        assert torch.equal(pipe.latents, result.latents)

        def fail(*_):
            raise RuntimeError("decoder")

        monkeypatch.setattr(pipe, "_decode", fail)
        with pytest.raises(RuntimeError, match="decoder"):
            pipe(setup("t2v", seed=2)[0])
    assert pipe.latents.shape == result.latents.shape and not torch.equal(pipe.latents, result.latents)


def test_a_run_that_never_denoised_has_no_latents(setup, monkeypatch):
    request, spec = setup("t2v")
    pipe = WanPipeline.from_request(request, spec)
    pipe(request)
    monkeypatch.setattr(WanModel, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(request)
    assert pipe.latents is None


# (case, flag of the file, task whose file is given, what the message says)
WRONG_FILES = [
    ("t2v", "dit", "i2v-14B", "Wan i2v transformer.*task t2v-1.3B needs.*in_dim 16"),
    ("i2v", "dit", "t2v-1.3B", "Wan t2v transformer.*task i2v-14B needs"),
    ("flf2v", "dit", "i2v-14B", "Wan i2v transformer.*task flf2v-14B needs"),
    ("i2v two experts", "low", "i2v-14B", "task i2v-A14B needs .*no image embedding"),
    ("t2v", "vae", "ti2v-5B", "Wan2.2 VAE"),
    ("ti2v text", "vae", "t2v-1.3B", "Wan2.1 VAE"),
]


@pytest.mark.parametrize("case, flag, other, message", WRONG_FILES)
def test_wrong_models_are_refused_before_any_work(setup, checkpoint, case, flag, other, message):
    spec, folder = checkpoint(other)
    file = spec.files.vae if flag == "vae" else "diffusion_pytorch_model.safetensors"
    request, spec = setup(case, **{flag: str(folder / file)})
    with pytest.raises(SwanError, match=message) as caught:
        WanPipeline.from_request(request, spec)
    assert "\n" not in str(caught.value) and str(folder / file) in str(caught.value)


@pytest.mark.parametrize(
    "flag, file, message", [("vae", "t5", "looks like a T5"), ("t5", "vae", "looks like a Wan2.1 VAE")]
)
def test_swapped_files_are_refused_before_any_work(setup, checkpoint, flag, file, message):
    spec, folder = checkpoint("t2v-1.3B")
    request, spec = setup("t2v", **{flag: str(folder / spec.files[file])})
    with pytest.raises(SwanError, match=message) as caught:
        WanPipeline.from_request(request, spec)
    assert "\n" not in str(caught.value)
