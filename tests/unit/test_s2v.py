"""Speech to video: the same numbers however weights are stored and streamed; films of clips; what is refused."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from wan.cache.options import check_options, make_manager

from tests.unit.sound_helpers import tone, write_sound
from tests.unit.tiny_checkpoint import dit_state, shrunk, write_checkpoint
from tests.unit.video_helpers import ramp, write
from tests.unit.weight_helpers import ShapeSource, manifest
from wan.audio import RATE, open_audio
from wan.conditioning.s2v import S2VCondition, S2VFilm, pose_pixels, pose_step, reference_pixels
from wan.conditioning.sizes import s2v_size
from wan.denoise import denoise
from wan.errors import SwanError, UsageError
from wan.file_checks import check_files
from wan.memory.experts import load_expert
from wan.memory.offload import Streamed
from wan.models import audio as encoder_module
from wan.models.dit import WanModel
from wan.options import build_request
from wan.options.replay import replay_options
from wan.pipeline import WanPipeline
from wan.plan import make_plan, measure
from wan.quant.linear import QuantLinear
from wan.solvers import make_solver
from wan.tasks import load_task
from wan.weights.checkpoint import Checkpoint
from wan.weights.infer import check_dit, infer_dit_config, misfits
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf, plan_tensors
from wan.weights.write.folder import Form, export_folder
from wan.weights.write.recipes import RECIPES

SPEC = shrunk("s2v-14B")
SPEC.dit.update(dim=64, ffn_dim=96)
CPU = torch.device("cpu")
GRID = 3, 8, 8


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in several forms."""
    folder = tmp_path_factory.mktemp("s2v")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(dit_state(SPEC), folder / "fp32.safetensors")
    source = open_source(folder / "fp32.safetensors")
    export_gguf(source, folder / "q8.gguf", "Q8_0")
    export_folder({"dit": source}, folder / "fp8", Form("fp8", torch.float32), copies={}, config={})
    return folder


def on_meta():
    with torch.device("meta"):
        return WanModel(**SPEC.dit)


def load(path, packed=False, **options):
    source = open_source(path)
    options = {"device": CPU, "compute_device": CPU, "dtype": torch.float32} | options
    return load_expert(on_meta(), source, packed=packed, **options)


def condition(motion=True):
    audio, (frames, *size) = noise(1, 25, 32, 4 * GRID[0], seed=4), GRID
    latents = noise(1, 16, 3, *size, seed=2) if motion else None
    return S2VCondition(noise(1, 16, 1, *size, seed=1), latents, noise(1, 16, frames, *size, seed=3), audio, (9, 3))


def conditional():
    return condition().inputs(SimpleNamespace(branch="cond"))


@torch.inference_mode()
def predict(model):
    x, text = noise(1, 16, *GRID), [noise(5, SPEC.dit.text_dim, seed=2)]
    return torch.cat([model(x, torch.tensor([t]), text, **conditional()) for t in (900, 30)])


# Files


@pytest.mark.parametrize("name", ["fp32.safetensors", "q8.gguf", "fp8"])
def test_what_a_file_holds_is_told_from_its_tensors(files, name):
    source = open_source(files / name)
    config = infer_dit_config(source)
    assert (config["model_type"], config["audio_inject_layers"], config["audio_dim"]) == ("s2v", [0, 2], 32)
    assert config["num_audio_token"] == 4 and config["cond_dim"] == 16
    assert config["enable_adain"] and config["enable_framepack"]
    check_dit(source, SPEC)


def test_a_gguf_file_of_full_size_quantises_the_blocks_alone():
    """As the community's tool: all that S2V adds to them is kept."""
    source = ShapeSource(manifest("s2v-14B"))
    planned = {one.name: one.type for one in plan_tensors(source, RECIPES["Q4_K_M"])}
    assert set(planned) == set(source.keys())
    quantised = {name for name, kind in planned.items() if kind.torch_name is None}
    assert len(quantised) == 40 * 10 and all(name.startswith("blocks.") for name in quantised)
    assert not misfits(infer_dit_config(source), load_task("s2v-14B"))


@pytest.mark.parametrize("name", ["q8.gguf", "fp8"])
def test_packed_is_dequantised(files, name):
    packed = load(files / name, packed=True)
    assert any(type(module) is QuantLinear for module in packed.blocks.modules())
    assert torch.equal(predict(packed), predict(load(files / name)))


@pytest.mark.parametrize("ops", ["cpu", "gpu", "reference", None])
def test_it_runs_on_the_meta_device(ops):
    with torch.device("meta"), torch.inference_mode():
        model = WanModel(**SPEC.dit, ops=ops).to(torch.bfloat16)
        for name, one in model.named_parameters():
            one.data = one.data.float() if model.keep_fp32(name) else one.data
        x = torch.empty(1, 16, *GRID)
        inputs = model.adapters[0].empty_inputs(x)
        out = model(x, torch.tensor([5], device="cpu"), torch.empty(1, 5, 32), **inputs)
    assert out.shape == (1, 16, *GRID) and out.is_meta


def test_a_batch_is_its_parts(files):
    model, inputs = load(files / "fp32.safetensors"), conditional()
    x, text, other = noise(2, 16, *GRID), noise(2, 5, SPEC.dit.text_dim), noise(1, 25, 32, 4 * GRID[0], seed=9)
    both = {name: torch.cat([one, one]) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
    both["audio_input"][1:] = other
    with torch.inference_mode():
        together = model(x, torch.tensor([900, 900]), text, **both)
        parts = [model(x[:1], torch.tensor([900]), text[:1], **inputs)]
        parts += [model(x[1:], torch.tensor([900]), text[1:], **inputs | {"audio_input": other})]
    assert torch.allclose(together, torch.cat(parts), atol=1e-5)


def test_inputs_that_do_not_fit_are_refused(files):
    model, x, text = load(files / "fp32.safetensors"), noise(1, 16, *GRID), [noise(5, SPEC.dit.text_dim)]
    for change, why in (
        ({"cond_states": noise(1, 16, 2, 8, 8)}, r"cond_states make tokens of \(2, 4, 4\)"),
        ({"ref_latents": noise(1, 16, 1, 8, 6)}, r"ref_latents make tokens of \(1, 4, 3\)"),
        ({"audio_input": noise(1, 25, 32, 8)}, "audio_input is for 2 latent frames, and there are 3"),
    ):
        with pytest.raises(ValueError, match=why):
            model(x, torch.tensor([900]), text, **conditional() | change)
    with pytest.raises(ValueError, match="audio_input is missing"):
        model(x, torch.tensor([900]), text)


# Streaming

WAYS = [
    {"granularity": granularity, "blocks_from": place, "resident_blocks": resident}
    for granularity, place, resident in itertools.product(["block", "phase"], ["ram", "disk"], [(), (1, 4)])
]


def test_units_come_in_the_order_of_their_use():
    after = ["audio_injector.injector_adain_layers.{}", "audio_injector.injector.{}"]
    first, second = ([name.format(n) for name in after] for n in (0, 1))
    assert list(on_meta().units()) == ["blocks.0", *first, "blocks.1", "blocks.2", *second]


@pytest.mark.parametrize("name, packed", [("fp32.safetensors", False), ("q8.gguf", True)])
def test_streamed_is_resident_bit_for_bit(files, name, packed):
    wanted = predict(load(files / name, packed))
    for way in WAYS:
        model = load(files / name, packed, **way)
        assert isinstance(model.offload, Streamed)
        assert torch.equal(predict(model), wanted), way
        model.offload.close()


# Sampling


@torch.inference_mode()
def sample(model, condition, manager=None):
    cached = {} if manager is None else {"cache": manager}

    def network(latent, times, ctx):
        text = [noise(5, SPEC.dit.text_dim, seed=2 if ctx.branch == "cond" else 3)]
        return model(latent, times, text, **condition.inputs(ctx), **({"ctx": ctx} | cached if cached else {}))

    solver = make_solver("unipc", steps=6, shift=5.0)
    return denoise(network, solver, noise(1, 16, *GRID), guide_scale=3.0, condition=condition, **cached)


@pytest.mark.parametrize("threshold, skips", [(0, False), (1e9, True)])
def test_a_cache_of_threshold_zero_changes_no_bit(files, threshold, skips):
    model = load(files / "fp32.safetensors")
    flags = {"fbcache": True, "fb_thresh": threshold, "fb_warmup": 1, "fb_last_steps": 1, "cache_force": True}
    manager = make_manager(check_options(flags, 6)[0], {})
    out = sample(model, condition(), manager)
    assert any(one.skipped for one in manager.telemetry.decisions) == skips
    assert torch.equal(out, sample(model, condition())) != skips


def test_without_guidance_there_is_no_audio(files):
    """The unconditional pass hears nothing; all else is the same."""

    given, other = conditional(), condition().inputs(SimpleNamespace(branch="uncond"))
    assert not other["audio_input"].any() and given["audio_input"].any()
    assert all(torch.equal(given[name], other[name]) for name in ("ref_latents", "motion_latents", "cond_states"))


# Films


def encode(video):
    return video[:, :1, ::4, ::8, ::8].expand(-1, 16, -1, -1, -1).contiguous()


def film_of(audio=None, **changes):
    given = {"seed": 3, "num_clip": 2, "infer_frames": 8, "start_from_ref": False, "trim_first_frames": 0}
    film = S2VFilm(SimpleNamespace(**given | changes), torch.full((3, 64, 64), 0.5), audio, motion_frames=17)
    film.heard = {0: noise(25, 4, 20)}
    return film


def test_the_first_clip_has_no_motion_and_loses_three_frames():
    film = film_of()
    first = film.condition(0, encode)
    assert first.motion is None and first.motion_frames == (17, 5)
    assert film.latents(0, noise(1, 16, 2, 8, 8)).shape[2] == 3
    video = noise(3, 9, 64, 64)
    frames, wanted = film.frames(0, video), video[:, 4:].clone()
    assert torch.equal(frames, wanted)
    state = film.state["motion"].clone()
    frames.zero_()  # whoever gets them changes them
    assert torch.equal(film.state["motion"], state) and torch.equal(state[:, -5:], wanted)
    assert not state[:, :-5].any()
    second = film.condition(1, encode)
    assert torch.equal(second.motion, encode(state[None]))
    assert film.latents(1, noise(1, 16, 2, 8, 8)).shape[2] == 7
    assert film.frames(1, noise(3, 25, 64, 64)).shape[1] == 8


def test_a_film_that_starts_from_its_reference_has_motion_at_once():
    film = film_of(start_from_ref=True)
    assert (film.state["motion"][:, -6:] == 0.5).all() and not film.state["motion"][:, :-6].any()
    assert film.condition(0, encode).motion is not None
    assert film.latents(0, noise(1, 16, 2, 8, 8)).shape[2] == 7
    assert film.frames(0, noise(3, 25, 64, 64)).shape[1] == 8


def test_another_process_can_go_on():
    film, other = film_of(), film_of()
    film.condition(0, encode)
    film.frames(0, noise(3, 9, 64, 64))
    other.state = film.state
    assert torch.equal(other.condition(1, encode).motion, film.condition(1, encode).motion)
    assert torch.equal(other.condition(1, encode).audio, film.condition(1, encode).audio)
    assert other.latents(1, noise(1, 16, 2, 8, 8)).shape[2] == 7


def test_past_the_end_of_the_audio_there_are_zeros():
    film = film_of(num_clip=3)
    assert torch.equal(film.condition(1, encode).audio[0], film.heard[0][..., 8:16])
    last = film.condition(2, encode).audio[0]
    assert torch.equal(last[..., :4], film.heard[0][..., 16:]) and not last[..., 4:].any()


@pytest.mark.parametrize("clips", [3, 5])
def test_audio_is_heard_window_by_window(tmp_path, monkeypatch, clips):
    """Each clip has the features of its frames, from one window or two; the last one may begin behind the end."""
    monkeypatch.setattr(encoder_module, "WINDOW_STEPS", 30)
    audio = open_audio(write_sound(tmp_path / "a.wav", tone(RATE, 2.0), RATE))
    film = film_of(num_clip=clips, audio=audio)
    whole = noise(25, 4, min(32, clips * 8))
    film.heard = {}
    for clip in range(clips):
        for window in film.unheard(clip):
            first = sum(len(part) for part in film._windows[:window])
            film.heard[window] = film.hear(lambda _, at, dtype, f=first: whole[..., f : f + len(at)], window, None)
        assert len(film.heard) <= 2 and not film.unheard(clip)
        seen = film.condition(clip, encode).audio[0]
        wanted = whole[..., clip * 8 :][..., :8]
        assert torch.equal(seen[..., : wanted.shape[-1]], wanted) and not seen[..., wanted.shape[-1] :].any()


def test_noise_has_values_of_bfloat16_and_a_seed_for_each_clip():
    film = film_of()
    first, second = film.noise(0, (1, 16, 2, 8, 8)), film.noise(1, (1, 16, 2, 8, 8))
    assert first.dtype == torch.float32 and torch.equal(first, first.bfloat16().float())
    assert torch.equal(second, torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(4)).bfloat16())


def test_leaving_out_frames_is_for_the_beginning_of_the_film():
    film = film_of(trim_first_frames=2)
    film.condition(0, encode)
    assert film.frames(0, noise(3, 9, 64, 64)).shape[1] == 3 and film.state["motion"][:, -5:].any()
    assert film.frames(1, noise(3, 25, 64, 64)).shape[1] == 8


def test_pictures_are_filled_up_with_black_and_poses_with_grey():
    small = np.full((64, 96, 3), 255, np.uint8)
    pixels, pose = reference_pixels(small, 64, 128), pose_pixels(small, 64, 128)
    for one, border in ((pixels, -1.0), (pose, 0.0)):
        assert (one[:, :, :16] == border).all() and (one[:, :, -16:] == border).all()
        assert torch.allclose(one[:, :, 16:-16], torch.ones(()))


def test_poses_are_thinned_out_to_whole_steps():
    assert [pose_step(fps, 16) for fps in (8, 16, 24, 25, 30, 40, 60)] == [1, 1, 2, 2, 2, 2, 4]


def test_sizes():
    """(height, width, area): official examples, and what has no size."""
    assert s2v_size(720 * 1280, 480, 832) == (512, 832) and s2v_size(1024 * 704, 1080, 1920) == (640, 1088)
    with pytest.raises(UsageError, match="too few|no size"):
        s2v_size(2000, 4000, 4000)


# The task


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """(spec, its checkpoint, options)"""
    spec, folder = shrunk("s2v-14B"), tmp_path_factory.mktemp("task")
    write_checkpoint(folder, spec)
    Image.fromarray(ramp(1, 70, 64)[0]).save(folder / "face.png")
    speech = write_sound(folder / "speech.wav", tone(RATE, 0.8), RATE)
    options = {"task": "s2v-14B", "ckpt_dir": str(folder), "image": str(folder / "face.png"), "audio": speech}
    options |= {"prompt": "she speaks", "size": "64*64", "infer_frames": 8, "sample_steps": 2, "seed": 1}
    return spec, folder, options | {"device": "cpu", "dtype": "fp32", "save_file": str(folder / "a.mp4")}


def made(spec, request, **more):
    return WanPipeline.from_request(request, spec)(request, **more)


@pytest.mark.parametrize(
    "changes, frames",
    [({}, 13), ({"num_clip": 1}, 5), ({"start_from_ref": True}, 16), ({"num_clip": 9}, 13), ({"infer_frames": 16}, 13)],
)
def test_a_film_is_as_long_as_its_audio(setup, changes, frames):
    spec, _, options = setup
    request = build_request(options | changes)
    assert make_plan(request, spec, measure(CPU, request, spec, 1))["frames"] == frames
    told = []
    result = made(spec, request, progress=lambda *one: told.append(one))
    assert result.frames.shape == (frames, 64, 64, 3)
    assert told[-1][0] == "decode" and told[-1][1] == told[-1][2] == request.sample.num_clip


def test_pose_and_audio_matter(setup, tmp_path):
    spec, folder, options = setup
    pose = str(write(tmp_path / "pose.avi", ramp(20, 64, 64)))
    other = write_sound(tmp_path / "other.wav", tone(RATE, 0.8, hertz=900), RATE)
    plain, posed, spoken = (
        made(spec, build_request(options | more)).frames for more in ({}, {"pose_video": pose}, {"audio": other})
    )
    assert (plain != posed).any() and (plain != spoken).any()


@pytest.mark.parametrize("way", [{"offload": "block"}, {"offload": "phase"}, {"residency": "keep"}])
def test_where_weights_lie_changes_nothing(setup, way):
    spec, _, options = setup
    assert (made(spec, build_request(options | way)).frames == made(spec, build_request(options)).frames).all()


REFUSED = [
    ({"audio": None}, "s2v-14B needs --image FILE and --audio FILE"),
    ({"image": None}, "s2v-14B needs --image FILE and --audio FILE"),
    ({"audio": "none.wav"}, "--audio: no file none.wav"),
    ({"infer_frames": 10}, "--infer_frames must be a multiple of 4, not 10"),
    ({"infer_frames": "many"}, "--infer_frames must be a whole number from 1 to 400, not 'many'"),
    ({"num_clip": 0}, "--num_clip must be a whole number from 1 to"),
    ({"frame_num": 81}, "--frame_num: s2v-14B makes clips of --infer_frames"),
    ({"fps": 24}, "--fps: s2v-14B makes 16 frames a second"),
    ({"enable_tts": True}, "--enable_tts: speech is not made from text here: .* with --audio"),
    ({"tts_text": "hello"}, "--tts_text: speech is not made from text here"),
    ({"last_frame": "a.png"}, "--last_frame is for .* not for s2v-14B"),
    ({"task": "t2v-tiny", "image": None, "ckpt_dir": None}, "--audio is for s2v tasks|makes video from text alone"),
]


@pytest.mark.parametrize("changes, why", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(setup, changes, why):
    with pytest.raises(UsageError, match=why) as error:
        build_request(setup[2] | changes)
    assert "\n" not in str(error.value)


def test_what_is_odd_is_told(setup, tmp_path):
    silent = write_sound(tmp_path / "silent.wav", np.zeros((1, RATE)), RATE)
    assert any("is silent" in line for line in build_request(setup[2] | {"audio": silent}).warnings)
    assert any("--num_clip 50 is more" in line for line in build_request(setup[2] | {"num_clip": 50}).warnings)


def test_files_are_checked(setup, tmp_path):
    spec, folder, _ = setup
    checkpoint = Checkpoint(folder, spec)
    assert "wav2vec" in checkpoint.components and not check_files(checkpoint)
    other = Checkpoint(folder, spec, {"wav2vec": str(folder / spec.files.vae)})
    with pytest.raises(SwanError, match="not a wav2vec2 encoder; the file looks like a Wan2.1 VAE"):
        check_files(other)


def test_an_old_pickled_audio_encoder_is_read(setup, tmp_path):
    spec, folder, options = setup
    source = open_source(folder / spec.files.wav2vec)
    torch.save({name: source.read(name) for name in source.keys()}, tmp_path / "pytorch_model.bin")
    request = build_request(options | {"wav2vec": str(tmp_path)})
    assert (made(spec, request).frames == made(spec, build_request(options)).frames).all()


def test_it_can_be_made_again(setup):
    spec, _, options = setup
    request = build_request(options | {"start_from_ref": True, "num_clip": 1})
    again = build_request(replay_options(request.settings(), {}, files=True))
    assert again.sample == request.sample


def test_the_plan_knows_clips_and_tokens(setup):
    spec, _, options = setup
    one, two = (make_plan(request, spec, measure(CPU, request, spec, 1)) for request in requests(options))
    assert two["clips"] == 2 and two["forwards"] == 2 * one["forwards"]
    assert one["tokens"] == 2 * 16 + 16 + 16 + 4 + 4  # video, reference, three parts of motion
    assert list(one["memory_bytes"]) == ["encode_text", "encode_audio", "encode_image", "denoise", "decode"]
    assert two["seconds"]["encode_image"] > one["seconds"]["encode_image"]
    assert {"wav2vec"} <= {row["component"] for row in one["weights"]} & {row["component"] for row in one["files"]}


def requests(options):
    return build_request(options | {"num_clip": 1}), build_request(options)
