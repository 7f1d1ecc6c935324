"""Animate: the same numbers however its weights are stored or streamed and whatever is cached; its films and inputs."""

import itertools
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from wan.cache.options import check_options, make_manager
from wan.distributed.parallel import Parallel

from tests.unit.animate_helpers import small_spec, write_inputs
from tests.unit.tiny_checkpoint import dit_state, write_checkpoint
from tests.unit.video_helpers import still, write
from wan.conditioning.animate import AnimateCondition, AnimateFilm, AnimateInputs
from wan.conditioning.letterbox import letterbox
from wan.conditioning.sizes import clip_count, ping_pong
from wan.denoise import denoise
from wan.errors import SwanError, UsageError
from wan.memory.experts import load_expert
from wan.memory.offload import Streamed
from wan.models.attention import get_attention
from wan.models.dit import WanModel
from wan.models.dit.adapters.animate import Face
from wan.models.dit.sequence import Group, Sequence
from wan.options import build_request
from wan.options.replay import replay_options
from wan.pipeline import WanPipeline
from wan.plan import make_plan
from wan.plan.machine import Machine
from wan.quant.linear import QuantLinear
from wan.solvers import make_solver
from wan.video import open_video
from wan.weights.infer import check_dit, infer_dit_config
from wan.weights.lora import open_lora, weight_shapes
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf
from wan.weights.write.folder import Form, export_folder

SPEC = small_spec()
SPEC.dit.update(dim=64, ffn_dim=96)
SIDE = SPEC.dit.face_px
CPU = torch.device("cpu")
FORMS = ("fp32.safetensors", "q8.gguf", "fp8", "mlx")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in several forms."""
    folder = tmp_path_factory.mktemp("animate")
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
    options = {"device": CPU, "compute_device": CPU, "dtype": torch.float32} | options
    return load_expert(on_meta(), open_source(path), packed=packed, **options)


def inputs(frames=3, seed=1):
    """Of latents of so many frames, the reference's included."""
    face = noise(1, 3, 1, SIDE, SIDE, seed=seed).clamp(-1, 1)
    return {
        "y": noise(1, 20, frames, 4, 6, seed=seed),
        "clip_fea": noise(1, 257, 1280, seed=seed),
        "pose_latents": noise(1, 16, frames - 1, 4, 6, seed=seed),
        "face_pixel_values": Face(face, 4 * (frames - 2) + 1),
    }


@torch.inference_mode()
def predict(model, given=None):
    given = given or inputs()
    x, text = noise(1, 16, 3, 4, 6), [noise(5, SPEC.dit.text_dim, seed=2)]
    return torch.cat([model(x, torch.tensor([t]), text, **given) for t in (900, 30)])


# The network


@pytest.mark.parametrize("name", FORMS)
def test_what_a_file_holds_is_told_from_its_tensors(files, name):
    source = open_source(files / name)
    config = infer_dit_config(source)
    assert (config["model_type"], config["motion_encoder_dim"], config["clip"]) == ("animate", 24, True)
    check_dit(source, SPEC)


@pytest.mark.parametrize("name", FORMS[1:])
def test_packed_is_dequantised(files, name):
    packed = load(files / name, packed=True)
    assert type(packed.blocks[0].ffn["0"]) is QuantLinear
    assert torch.equal(predict(packed), predict(load(files / name)))


@pytest.mark.parametrize("name, packed", [("fp32.safetensors", False), ("q8.gguf", True), ("fp8", True), ("mlx", True)])
def test_streamed_is_resident_bit_for_bit(files, name, packed):
    wanted = predict(load(files / name, packed))
    for granularity, place, resident in (("block", "ram", ()), ("phase", "disk", (1, 4)), ("phase", "ram", (0,))):
        way = {"granularity": granularity, "blocks_from": place, "resident_blocks": resident}
        model = load(files / name, packed, **way)
        assert isinstance(model.offload, Streamed)
        assert torch.equal(predict(model), wanted), way
        model.offload.close()


def test_what_is_seen_counts(files):
    model = load(files / "fp32.safetensors")
    outs = [predict(model)]
    for name in ("y", "clip_fea", "pose_latents", "face_pixel_values"):
        outs.append(predict(model, {**inputs(), name: inputs(seed=9)[name]}))
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(outs, 2))


def test_the_face_is_encoded_once_for_a_run_with_the_same_result(files):
    model, given = load(files / "fp32.safetensors"), inputs()
    pictures = []
    model.motion_encoder.register_forward_hook(lambda module, args, out: pictures.append(len(args[0])))
    once = predict(model, given)
    assert sum(pictures) == 1  # of two forwards with a face that stays the same
    given["face_pixel_values"] = inputs()["face_pixel_values"].pixels.expand(-1, -1, 5, -1, -1)
    assert torch.allclose(predict(model, given), once, atol=1e-5) and sum(pictures) == 1 + 2 * 5


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("pose_latents", noise(1, 16, 3, 4, 6), r"pose_latents is \[1, 16, 3, 4, 6\]; these latents need"),
        ("face_pixel_values", noise(1, 3, 4, SIDE, SIDE), "face_pixel_values is .* need .1, 3, 5, 64, 64."),
        ("face_pixel_values", noise(1, 3, 5, 32, 32), "face_pixel_values is .* need .1, 3, 5, 64, 64."),
        ("vace_context", noise(1), "vace_context is given, but this model has no use for it"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(files, name, value, words):
    with pytest.raises(ValueError, match=words):
        predict(load(files / "fp32.safetensors"), {**inputs(), name: value})


@pytest.mark.parametrize("ops", ["cpu", "gpu", "reference", None])
def test_it_runs_on_the_meta_device(ops):
    with torch.device("meta"), torch.inference_mode():
        model = WanModel(**SPEC.dit, ops=ops).to(torch.bfloat16)
        latent, clip_fea = torch.empty(1, 16, 3, 4, 6), torch.empty(1, 257, 1280)
        given = {"y": torch.empty(1, 20, 3, 4, 6), "clip_fea": clip_fea, **model.adapters[0].empty_inputs(latent)}
        out = model(latent, torch.tensor([5], device="cpu"), torch.empty(1, 5, 32), **given)
    assert out.shape == (1, 16, 3, 4, 6) and out.is_meta


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7])
def test_each_token_is_of_one_latent_frame_whoever_has_it(ranks):
    groups = [Group((4, 2, 3)), Group((2, 1, 3), is_seen=False)]
    found = []
    for rank in range(ranks):
        sequence = Sequence(groups, Parallel(), get_attention("sdpa"), None, 24, CPU)
        sizes = [30 // ranks + (one < 30 % ranks) for one in range(ranks)]
        sequence.shards = SimpleNamespace(start=sum(sizes[:rank]), size=sizes[rank])
        for group in (0, 1):
            for frame, rows in sequence.frames_of(group):
                assert 0 <= rows.start < rows.stop <= sizes[rank]
                found += [(group, frame)] * (rows.stop - rows.start)
    assert found == [(0, frame) for frame in range(4) for _ in range(6)] + [(1, f) for f in range(2) for _ in range(3)]


@pytest.mark.parametrize("threshold, skips", [(0, False), (1e9, True)])
def test_a_cache_of_threshold_zero_changes_no_bit(files, threshold, skips):
    model, given = load(files / "fp32.safetensors"), inputs()
    none = Face(-torch.ones(1, 3, 1, SIDE, SIDE), 5)
    condition = AnimateCondition(
        given["y"], given["pose_latents"], given["face_pixel_values"], none, clip_fea=given["clip_fea"]
    )

    @torch.inference_mode()
    def sample(manager=None):
        cached = {} if manager is None else {"cache": manager}

        def network(latent, times, ctx):
            text = [noise(5, SPEC.dit.text_dim, seed=2 if ctx.branch == "cond" else 3)]
            return model(latent, times, text, **condition.inputs(ctx), **({"ctx": ctx} | cached if cached else {}))

        solver = make_solver("unipc", steps=6, shift=5.0)
        return denoise(network, solver, noise(1, 16, 3, 4, 6), guide_scale=3.0, condition=condition, **cached)

    flags = {"fbcache": True, "fb_thresh": threshold, "fb_warmup": 1, "fb_last_steps": 1, "cache_force": True}
    manager = make_manager(check_options(flags, 6)[0], {})
    out = sample(manager)
    assert any(one.skipped for one in manager.telemetry.decisions) == skips
    assert torch.equal(out, sample()) != skips


# The film


def encode(video):
    """Stands for the VAE: the mean of each cell, of the frames of each latent frame."""
    first, rest = video[:, :, :1], video[:, :, 1:]
    cells = torch.nn.functional.avg_pool2d(torch.cat([first, rest.unflatten(2, (-1, 4)).mean(3)], 2)[0], 8)
    return cells[:1].expand(16, -1, -1, -1)[None].contiguous()


def make_film(folder, overlap=1, replaces=False, **changes):
    names = ("src_pose", "src_face", *(("src_bg", "src_mask") if replaces else ()))
    videos = [open_video(folder / f"{name}.mp4") for name in names]
    picture = np.asarray(Image.open(folder / "src_ref.png"))
    sample = {"height": 32, "width": 48, "frame_num": 9, "trim_first_frames": 0, "seed": 5} | changes
    return AnimateFilm(SimpleNamespace(**sample), AnimateInputs(picture, *videos), overlap)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("source"), frames=12, face=32)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_film_can_go_on_in_another_process(source, replaces):
    film = make_film(source, replaces=replaces)
    assert film.clips == 2
    film.condition(0, encode)
    shape, video = (1, 16, 4, 4, 6), noise(3, 9, 32, 48)
    draws = [film.noise(clip, shape) for clip in (0, 1)]
    assert film.frames(0, video.clone()).shape[1] == 9
    assert torch.equal(film.state["overlap"], video[:, -1:].clamp(-1, 1))
    other = make_film(source, replaces=replaces)
    other.state = {name: value.clone() for name, value in film.state.items()}
    one, two = film.condition(1, encode), other.condition(1, encode)
    assert torch.equal(one.y, two.y) and torch.equal(one.pose, two.pose)
    assert torch.equal(one.face.pixels, two.face.pixels)
    generator = torch.Generator().manual_seed(5)
    for draw in draws:
        assert torch.equal(draw, torch.randn(shape, generator=generator))
    assert torch.equal(other.noise(1, shape), draws[1])
    kept = other.frames(1, noise(3, 9, 32, 48, seed=1))
    assert kept.shape[1] == 12 - 9  # the rest was to fill the clip
    assert torch.equal(kept, noise(3, 9, 32, 48, seed=1)[:, 1:4])


def test_what_is_given_of_a_clip(source):
    film = make_film(source, overlap=5, frame_num=13)
    first = film.condition(0, encode)
    assert first.y.shape == (1, 20, 5, 4, 6) and first.pose.shape == (1, 16, 4, 4, 6)
    assert (first.y[0, :4, 0] == 1).all() and (first.y[0, :4, 1:] == 0).all() and (first.y[0, 4:, 1:] == 0).all()
    assert first.clip_images[0].shape == (3, 1, 32, 48) and first.extra_frames == 1
    film.state["overlap"] = torch.full((3, 5, 32, 48), 0.5)
    film.inputs = film.inputs.__class__(film.inputs.reference, film.inputs.pose, film.inputs.face)
    later = film.condition(1, encode)
    assert later.y[0, :4, 1:, 0, 0].T.flatten().tolist() == [1] * 8 + [0] * 8  # the first frame counts four times
    assert torch.allclose(later.y[0, 4:, 1:3], torch.tensor(0.5)) and (later.y[0, 4:, 3:] == 0).all()
    assert (first.no_face.pixels == -1).all() and first.no_face.frames == 13


def test_a_background_is_given_outside_of_the_mask(source):
    film = make_film(source, replaces=True)
    mask = film.condition(0, encode).y[0, :4, 1:]
    wanted = torch.ones(4, 6)
    wanted[1, 1:3] = 0  # of 32 x 48 pixels, rows 8 to 15 and columns 12 to 23: those read are every eighth
    wanted[1, 1] = 1
    assert torch.allclose(mask, wanted.expand(4, 3, -1, -1), atol=0.05)


def test_only_the_frames_of_a_clip_are_in_memory(source):
    film, held = make_film(source), []
    real = film.inputs.pose

    class Watched:
        def __len__(self):
            return len(real)

        def frames(self, ids):
            held.append(list(ids))
            return real.frames(ids)

    film.inputs = AnimateInputs(film.inputs.reference, Watched(), film.inputs.face)
    film.state["overlap"] = torch.zeros(3, 1, 32, 48)
    film.condition(1, encode)
    assert held == [[6, 7, 8, 9, 10, 11]]  # 8 to 11 and back to 6: each once


def test_lengths():
    assert [ping_pong(index, 1) for index in range(3)] == [0, 0, 0]
    assert [ping_pong(index, 2) for index in range(4)] == [0, 1, 0, 1]
    assert [ping_pong(index, 4) for index in range(8)] == [0, 1, 2, 3, 2, 1, 0, 1]
    assert (clip_count(77, 77, 1), clip_count(78, 77, 1), clip_count(153, 77, 5), clip_count(2, 77, 1)) == (1, 2, 3, 1)


def test_a_letterbox_has_black_bars():
    white = np.full((10, 20, 3), 255, np.uint8)
    boxed = letterbox(white, 32, 48)
    assert (boxed[4:28] == 255).all() and (boxed[:4] == 0).all() and (boxed[28:] == 0).all()
    assert letterbox(np.full((500, 1, 3), 9, np.uint8), 16, 16).sum() == 16 * 9 * 3  # a line is one pixel wide at least


# The whole


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SPEC)


@pytest.fixture
def options(checkpoint, source, tmp_path):
    return {
        "task": "animate-14B",
        "ckpt_dir": str(checkpoint),
        "src_root_path": str(source),
        "frame_num": 9,
        "sample_steps": 1,
        "seed": 1,
        "device": "cpu",
        "dtype": "fp32",
        "save_file": str(tmp_path / "a.mp4"),
    }


@pytest.mark.parametrize("more", [{}, {"replace_flag": True, "refert_num": 5, "frame_num": 13}])
def test_from_files_to_frames(options, more):
    request = build_request(options | more)
    assert request.sample.prompt == SPEC.prompt and request.warnings == (
        "--src_face is 32x32: it is resized to 512x512",
    )
    pipe = WanPipeline.from_request(request, SPEC)
    result = pipe(request)
    assert result.frames.shape == (12, 32, 48, 3) and result.frames.std() > 0
    assert pipe.plan["frames"] == 12 and pipe.plan["clips"] == (1 if more else 2)
    assert np.array_equal(result.frames, pipe(request).frames)


def test_the_prompt_acts(options):
    request = build_request(options | {"prompt": "b"})
    assert request.sample.prompt == "b"
    pipe = WanPipeline.from_request(request, SPEC)
    other = request.changed(prompt=SPEC.prompt)
    assert not np.array_equal(pipe(request).frames, pipe(other).frames)


def test_relighting_lora(options, checkpoint, source):
    """A PEFT adapter in a checkpoint of PyTorch, rank and alpha alike."""
    with pytest.raises(UsageError, match=r"no relighting_lora\.ckpt in .*; download it, and give it with --lora FILE"):
        build_request(options | {"use_relighting_lora": True})
    shapes = weight_shapes(on_meta())
    adapter = {}
    for name in ("blocks.0.self_attn.q", "blocks.5.ffn.2", "blocks.1.cross_attn.k_img"):
        rows, columns = shapes[f"{name}.weight"]
        adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"] = noise(4, columns), noise(rows, 4)
    path = checkpoint / "relighting_lora.ckpt"
    torch.save({"state_dict": adapter}, path)
    try:
        request = build_request(options | {"use_relighting_lora": True})
        assert request.sample.lora == ((str(path.resolve()), 1.0),)
        assert (
            build_request(options | {"use_relighting_lora": True, "lora": str(path)}).sample.lora == request.sample.lora
        )
        opened = open_lora(path, shapes)
        assert len(opened.updates) == 3 and not opened.notes
        delta = opened.delta("blocks.0.self_attn.q.weight", lambda rows: None)
        a, b = (adapter[f"blocks.0.self_attn.q.lora_{one}.weight"] for one in "AB")
        assert torch.allclose(delta, b @ a)
        settings = request.settings()
        assert "use_relighting_lora" not in settings and settings["lora"][0][0] == str(path.resolve())
    finally:
        path.unlink()
    with pytest.raises(UsageError, match="--use_relighting_lora: t2v-tiny has no relighting LoRA"):
        build_request({"use_relighting_lora": True})


@pytest.mark.parametrize(
    "spoil, told",
    [(np.zeros_like, "black: nothing is replaced"), (lambda f: np.full_like(f, 255), "white: all of the picture")],
)
def test_a_mask_of_one_colour_is_doubted(options, source, tmp_path, spoil, told):
    folder = shutil.copytree(source, tmp_path / "in")
    change(folder, "src_mask.mp4", spoil)
    request = build_request(options | {"src_root_path": str(folder), "replace_flag": True})
    assert [line for line in request.warnings if told in line]


def test_the_example_has_nothing_to_replace():
    with pytest.raises(UsageError, match="the example of this task has no src_bg.mp4: give --src_root_path DIR"):
        build_request({"task": "animate-tiny", "replace_flag": True})


def test_a_replay_asks_for_the_files(options, source):
    request = build_request(options | {"replace_flag": True})
    settings = request.settings()
    names = ("src_pose", "src_face", "src_ref", "src_bg", "src_mask")
    assert {settings[name] for name in names} == {
        str(source / f"{name}.{'png' if name == 'src_ref' else 'mp4'}") for name in names
    }
    assert settings["replace_flag"] is True and settings["refert_num"] == 1 and "film_frames" not in settings
    given = {"ckpt_dir": options["ckpt_dir"], "save_file": options["save_file"]}
    with pytest.raises(UsageError, match=r"add .*--src_(mask|pose)"):
        replay_options(settings, given)
    again = build_request(replay_options(settings, given | {name: settings[name] for name in names}))
    assert again.sample == request.sample


def test_clips_multiply_what_the_plan_expects(options, tmp_path):
    plans = []
    for frames in (9, 33):
        folder = write_inputs(tmp_path / str(frames), frames=frames, face=32)
        request = build_request(options | {"src_root_path": str(folder)})
        plans.append(make_plan(request, SPEC, Machine("cuda", 80 << 30, 80 << 30, 1e14)))
    one, four = plans
    assert (one["clips"], four["clips"], four["frames"]) == (1, 4, 33)
    assert four["forwards"] == 4 * one["forwards"]
    for stage in ("encode_image", "denoise", "decode"):
        assert four["seconds"][stage] == pytest.approx(4 * one["seconds"][stage])
    assert all(
        four["memory_bytes"][stage]["device"] >= one["memory_bytes"][stage]["device"] for stage in one["memory_bytes"]
    )


def test_what_is_used_after_blocks_is_told():
    assert [path for path in on_meta().units() if "blocks" not in path.split(".")[0]] == ["face_adapter.fuser_blocks.0"]


# Inputs that are refused


def change(folder, name, make):
    """Another video or picture under the name of one."""
    path = folder / name
    frames = np.stack(list(open_video(path).frames(range(len(open_video(path))))))
    path.unlink()
    write(path, make(frames), pix_fmt="yuv420p") if name.endswith("mp4") else still(path, make(frames)[0])


SPOILT = {
    "no pose": (
        lambda at: (at / "src_pose.mp4").unlink(),
        {},
        r"has no src_pose\.mp4: put it there, or give --src_pose FILE",
    ),
    "no face": (lambda at: (at / "src_face.mp4").unlink(), {}, r"has no src_face\.mp4"),
    "no reference": (lambda at: (at / "src_ref.png").unlink(), {}, r"has no src_ref\.png"),
    "no mask": (lambda at: (at / "src_mask.mp4").unlink(), {"replace_flag": True}, r"has no src_mask\.mp4"),
    "no folder": (lambda at: None, {"src_root_path": "/nowhere"}, "--src_root_path: no folder /nowhere"),
    "nothing": (
        lambda at: None,
        {"src_root_path": None},
        "animate needs --src_root_path DIR with src_pose.mp4, or --src_pose",
    ),
    "face is no square": (
        lambda at: change(at, "src_face.mp4", lambda f: f[:, :, :16]),
        {},
        "--src_face is 16x32, and it needs a square, 512x512 at best: python -m wan.prepare animate --face_box",
    ),
    "odd size": (
        lambda at: change(at, "src_pose.mp4", lambda f: f[:, :, :40]),
        {},
        "--src_pose is 40x32, and both sides need multiples of 16 pixels: python -m wan.prepare animate makes it so",
    ),
    "mask of another size": (
        lambda at: change(at, "src_mask.mp4", lambda f: f[:, :, :32]),
        {"replace_flag": True},
        "--src_mask is 32x32 and --src_pose 48x32: they need the same size",
    ),
    "face too short": (
        lambda at: change(at, "src_face.mp4", lambda f: f[:7]),
        {},
        "--src_face has 7 frames and --src_pose 12: they need as many",
    ),
    "too short": (
        lambda at: [change(at, f"src_{one}.mp4", lambda f: f[:5]) for one in ("pose", "face")],
        {"refert_num": 5, "frame_num": 13},
        r"--src_pose has 5 frames: give a video of more than 5 \(--refert_num\)",
    ),
    "coloured mask": (
        lambda at: change(at, "src_mask.mp4", lambda f: np.where(f > 0, f, np.uint8([0, 0, 200]))),
        {"replace_flag": True},
        "--src_mask is no mask, it is coloured: it needs white where the character is",
    ),
    "grey mask": (
        lambda at: change(at, "src_mask.mp4", lambda f: np.full_like(f, 128)),
        {"replace_flag": True},
        "--src_mask is no mask, it is grey",
    ),
    "inverted mask": (
        lambda at: [change(at, "src_mask.mp4", lambda f: 255 - f)],
        {"replace_flag": True},
        "--src_mask looks inverted: --src_bg is black where it is black",
    ),
    "77": (
        lambda at: None,
        {"refert_num": 77},
        "--refert_num must be 1 or 5 frames that clips share, not 77, the default",
    ),
    "three": (lambda at: None, {"refert_num": 3}, "--refert_num must be 1 or 5 frames that clips share, not 3$"),
    "clips too short": (
        lambda at: None,
        {"refert_num": 5},
        r"--frame_num 9 is too short for clips that go on: clips share 5 frames \(--refert_num\); give at least 13",
    ),
    "mask alone": (
        lambda at: None,
        {"src_mask": "x.mp4"},
        "--src_mask is for the replacement of a character: give --repl",
    ),
    "other task's": (lambda at: None, {"src_video": "x.mp4"}, "--src_video is for vace tasks, not for animate-14B"),
    "for another task": (lambda at: None, {"task": "t2v-tiny"}, "--src_root_path is for animate tasks"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_bad_inputs_are_one_line(options, source, tmp_path, spoilt):
    spoil, more, words = SPOILT[spoilt]
    folder = write_inputs(tmp_path / "inputs", frames=12, face=32)
    spoil(folder)
    with pytest.raises((UsageError, SwanError)) as error:
        given = options | {"src_root_path": str(folder)} | more
        build_request({name: value for name, value in given.items() if name != "ckpt_dir" or "task" not in more})
    assert "\n" not in str(error.value)
    assert re.search(words, str(error.value)), str(error.value)


def test_what_is_told_beforehand(options, tmp_path):
    folder = write_inputs(tmp_path / "inputs", frames=12, face=512)
    assert build_request(options | {"src_root_path": str(folder)}).warnings == ()
    change(folder, "src_mask.mp4", lambda f: np.where(f > 0, 0, 255).astype(np.uint8))
    change(folder, "src_bg.mp4", lambda f: np.full_like(f, 90))
    told = build_request(options | {"src_root_path": str(folder), "replace_flag": True, "size": "720*1280"}).warnings
    assert told == (
        "--size has no effect: the video is 48x32 as --src_pose",
        "--src_mask is white at the borders: white is where the character is, and black all around it",
    )


def test_files_have_flags_of_their_own(options, source):
    folder = options.pop("src_root_path")
    paths = {
        "src_pose": f"{folder}/src_pose.mp4",
        "src_face": f"{folder}/src_face.mp4",
        "src_ref": f"{folder}/src_ref.png",
    }
    assert build_request(options | paths).sample == build_request(options | {"src_root_path": folder}).sample
    picture = Image.open(paths["src_ref"])
    assert build_request(options | paths | {"src_ref": picture}).sample.src_ref is picture
