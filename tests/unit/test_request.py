"""Every bad request ends in one line that says what is allowed; a good one has every default filled in."""

import os

import pytest
from PIL import Image

from wan.errors import SwanError, UsageError
from wan.options import FLAGS, build_request, check_device
from wan.options.names import RCM_NAMES, SOLVER_NAMES
from wan.options.replay import replay_options


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("red.png")
    Image.new("RGB", (60, 40), "blue").save("blue.png")
    (tmp_path / "weights").mkdir()


def official(task, **options):
    return build_request({"task": task, "ckpt_dir": "weights", "prompt": "a cat", **options})


def test_defaults_of_the_embedded_task(tmp_path):
    request = build_request({})
    assert (request.load.task, request.sample.prompt) == ("t2v-tiny", "a red circle moving right on a black background")
    assert (request.sample.width, request.sample.height, request.sample.frame_num) == (64, 64, 17)
    assert request.load.ckpt_dir.endswith("tiny") and request.load.device == "auto" and request.load.offload == "auto"
    assert request.output.save_file.startswith(str(tmp_path)) and request.output.save_file.endswith(".mp4")


def test_official_defaults_and_overrides():
    request = official("t2v-A14B", size="832x480", sample_guide_scale="2,3", seed="5", sample_steps=4)
    assert (
        request.sample.size,
        request.sample.guide_scale,
        request.sample.seed,
        request.sample.steps,
    ) == ("832*480", (2.0, 3.0), 5, 4)
    assert request.sample.shift == 12.0 and request.sample.solver == "unipc" and request.sample.negative_prompt
    assert official("t2v-A14B", sample_guide_scale="2").sample.guide_scale == (2.0, 2.0)
    assert official("t2v-A14B", negative_prompt="").sample.negative_prompt == ""


def test_shift_of_i2v_follows_the_size():
    assert official("i2v-14B", image="red.png", size="832*480").sample.shift == 3.0
    assert official("i2v-14B", image="red.png", size="1280*720").sample.shift == 5.0
    assert official("i2v-A14B", image="red.png", size="832*480").sample.shift == 5.0


def test_size_follows_the_image():
    request = official("i2v-14B", image="red.png", size="832*480")
    assert (request.sample.width, request.sample.height, request.sample.size) == (768, 512, "832*480")
    request = official("ti2v-5B", image="red.png")
    assert (request.sample.width % 32, request.sample.height % 32) == (
        0,
        0,
    ) and request.sample.width > request.sample.height


def test_unofficial_size_is_a_warning():
    assert "not an official size" in official("t2v-14B", size="640*368").warnings[0]
    assert official("t2v-14B", size="832*480").warnings == ()


def test_random_seed_is_drawn_and_kept():
    seeds = {build_request({"seed": -1}).sample.seed for _ in range(4)}
    assert len(seeds) == 4 and min(seeds) >= 0


def test_default_name_is_clean():
    name = build_request({"prompt": "a*b\tc\nd/e 你好 " + "x" * 300}).output.save_file.rsplit("/")[-1]
    assert not set("*\t\n ") & set(name) and "你好" in name and len(name.encode()) < 200
    assert build_request({"frame_num": 1}).output.save_file.endswith(".png")


def test_hub_id_and_missing_folder():
    assert official("t2v-14B", ckpt_dir="Wan-AI/Wan2.1-T2V-14B").load.ckpt_dir == "Wan-AI/Wan2.1-T2V-14B"
    with pytest.raises(UsageError, match="no folder weights/T2V"):  # weights/ is here, so this is a path
        official("t2v-14B", ckpt_dir="weights/T2V")


def test_step_list_sets_the_steps():
    request = build_request({"denoising_step_list": "1000,750,500,250"})
    assert request.sample.steps == 4 and request.sample.denoising_step_list == (1000.0, 750.0, 500.0, 250.0)


BAD = [
    ({"task": "t2v-9B"}, "unknown task.*t2v-1.3B"),
    ({"size": "100*64"}, "multiples of 16 pixels; the nearest is 96"),
    ({"size": "0*64"}, "multiples of 16"),
    ({"size": "big"}, "WIDTH\\*HEIGHT"),
    ({"frame_num": 16}, "4n \\+ 1"),
    ({"frame_num": 0}, "--frame_num must be"),
    ({"fps": 0}, "--fps must be"),
    ({"prompt": "  \n"}, "prompt is empty"),
    ({"prompt": "x" * 20_000}, "at most 10000"),
    ({"prompt": "\udc80"}, "not valid UTF-8"),
    ({"image": "red.png"}, "--image is for i2v, flf2v, ti2v"),
    ({"last_frame": "red.png"}, "--last_frame is for i2v, flf2v"),
    ({"seed": -2}, "-1 for a random one"),
    ({"seed": 2**63}, "-1 for a random one"),
    ({"seed": "1.5"}, "--seed must be"),
    ({"sample_steps": 0}, "--sample_steps must be"),
    ({"sample_steps": 2.5}, "--sample_steps must be"),
    ({"sample_shift": "-1"}, "above 0"),
    ({"sample_shift": "nan"}, "above 0"),
    ({"sample_guide_scale": "-1"}, "at least 0"),
    ({"sample_guide_scale": "inf"}, "at least 0"),
    ({"sample_guide_scale": "3,4"}, "one expert"),
    ({"sample_solver": "ddim"}, "unipc, dpm\\+\\+, euler"),
    ({"denoising_step_list": "250,500"}, "falling"),
    ({"denoising_step_list": "1001"}, "falling"),
    ({"denoising_step_list": [1000 - n / 2 for n in range(1500)]}, "falling"),
    ({"sample_shift": 1e39}, "above 0"),
    ({"vram_gb": "1e300"}, "above 0"),
    ({"lora": "red.png:1e39"}, "strength must be a number, not '1e39'"),
    ({"lora": [["red.png", 10**400]]}, "strength must be a number"),
    ({"denoising_step_list": "1000,500", "sample_steps": "3"}, "contradicts"),
    ({"save_file": "video.avi"}, "must end in .mp4"),
    ({"save_file": "video.png"}, "one frame"),
    ({"save_file": "no/such/video.mp4"}, "no folder"),
    ({"save_file": "x" * 300 + ".mp4"}, "cannot write"),
    ({"save_file": "/proc/video.mp4"}, "cannot write"),
    ({"device": "tpu"}, "auto, cpu, cuda"),
    ({"dtype": "int8"}, "auto, bf16, fp16, fp32"),
    ({"attention": "warp"}, "auto, sdpa, cudnn, flash_attn2, flash_attn3, flash_attn4, sage_attn2"),
    ({"dtype": "fp32", "convert_model_dtype": True}, "contradicts"),
    ({"vae_tile_px": 100}, "multiple of 8"),
    ({"ckpt_dir": "/no/such/folder"}, "no folder /no/such/folder"),
    ({"ckpt_dir": "red.png"}, "single file"),
    ({"task": "t2v-tiny", "high": "red.png"}, "no meaning for t2v-tiny"),
    ({"vae": "gone.pth"}, "no file gone.pth"),
    ({"teacache_speed": 1}, "unknown option: teacache_speed"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[message for _, message in BAD])
def test_bad_request(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        build_request(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("t2v-14B", {"ckpt_dir": None}, "Wan-AI/Wan2.1-T2V-14B"),
        ("t2v-14B", {"prompt": None}, "prompt is empty"),
        ("i2v-14B", {}, "needs --image"),
        ("i2v-14B", {"image": "red.png", "last_frame": "red.png"}, "for flf2v"),
        ("i2v-14B", {"image": "gone.png"}, "no image file gone.png"),
        ("flf2v-14B", {"first_frame": "red.png"}, "--last_frame"),
        ("flf2v-14B", {"image": "red.png", "last_frame": "red.png", "frame_num": 1}, "at least 5"),
        ("flf2v-14B", {"image": "red.png", "first_frame": "blue.png", "last_frame": "red.png"}, "give one"),
        ("ti2v-5B", {"size": "1280*720"}, "multiples of 32"),
        ("t2v-A14B", {"dit": "red.png"}, "--high, --low"),
        ("t2v-A14B", {"sample_guide_scale": "1,2,3"}, "LOW,HIGH"),
    ],
)
def test_bad_request_of_an_official_task(task, options, message):
    with pytest.raises(UsageError, match=message):
        official(task, **options)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_unreadable_image_is_the_files_fault(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(SwanError, match="cannot read image bad.png") as caught:
        official("i2v-14B", image="bad.png")
    assert caught.value.exit_code == 1


def test_truncated_image(tmp_path):
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SwanError, match="cut.png"):
        official("i2v-14B", image="cut.png")


def test_the_check_of_the_output_leaves_nothing(tmp_path):
    before = sorted(tmp_path.iterdir())
    build_request({"save_file": "video.mp4"})
    assert sorted(tmp_path.iterdir()) == before


def test_runs_of_the_same_moment_take_two_names():
    assert len({build_request({"seed": 1}).output.save_file for _ in range(20)}) == 20


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
@pytest.mark.parametrize(
    "options, inputs",
    [
        ({"task": "i2v-tiny", "image": "a.png", "save_file": "a.png", "frame_num": 1}, "image"),
        ({"lora": "a.png", "save_file": "a.png", "frame_num": 1}, "lora"),
        ({"vae": "a.png", "save_file": "a.png", "frame_num": 1}, "vae"),
        ({"vae": "a.png", "teacache": True, "cache_trace": "a.png"}, "vae"),
        (
            {"teacache": True, "cache_trace": "a.png", "save_file": "a.png", "frame_num": 1, "cache_force": True},
            "save_file",
        ),
    ],
)
def test_an_output_never_takes_the_place_of_an_input(tmp_path, options, inputs, link):
    (tmp_path / "red.png").rename("a.png")
    if link:
        link("a.png", "b.png")
        (output,) = [name for name in ("cache_trace", "save_file") if name in options][:1]
        options = options | {output: "b.png"}
    with pytest.raises(UsageError, match=f"and --{inputs} both name .*: it would be overwritten"):
        build_request(options)


def test_an_output_is_not_the_replayed_video_or_a_file_of_the_checkpoint(tmp_path):
    (tmp_path / "a.mp4").write_text("a video")
    with pytest.raises(UsageError, match="--save_file and --replay both name"):
        build_request({"save_file": "a.mp4"}, replayed="a.mp4")
    for name in ("vae.pth", "config.json", "dit.safetensors", "t.jsonl"):
        (tmp_path / "weights" / name).write_text("precious")
    official("t2v-1.3B", ckpt_dir=".", save_file="a.mp4")  # a video of an earlier run
    official("t2v-1.3B", easycache=True, cache_trace="weights/t.jsonl")
    for name in ("vae.pth", "config.json", "dit.safetensors"):
        with pytest.raises(UsageError, match=f"--cache_trace .*/{name} is a file of --ckpt_dir"):
            official("t2v-1.3B", easycache=True, cache_trace=f"weights/{name}")
    (tmp_path / "weights" / "vae.safetensors.index.json").write_text("{}")
    with pytest.raises(UsageError, match="--cache_trace .*/dit.safetensors is a file of --vae"):
        build_request(
            {"vae": "weights/vae.safetensors.index.json", "teacache": True, "cache_trace": "weights/dit.safetensors"}
        )
    with pytest.raises(UsageError, match="--cache_trace: cannot write to /proc"):
        official("t2v-1.3B", easycache=True, cache_trace="/proc/trace")


def test_settings_make_the_same_request_again():
    first = official("flf2v-14B", image="red.png", last_frame="blue.png", size="832*480", save_file="a.mp4")
    again = build_request(replay_options(first.settings(), {"save_file": "a.mp4"}, files=True))
    assert again == first


def test_replay_keeps_what_is_given_and_minds_a_changed_image(tmp_path):
    settings = official("i2v-14B", image="red.png", seed=3).settings()
    given = {"ckpt_dir": "weights"}
    assert build_request(replay_options(settings, {"seed": "4", "size": None, **given})).sample.seed == 4
    Image.new("RGB", (60, 40), "green").save("red.png")
    with pytest.raises(SwanError, match="changed since"):
        replay_options(settings, given)
    assert build_request(replay_options(settings, {"image": "red.png", **given})).sample.seed == 3
    (tmp_path / "red.png").unlink()
    with pytest.raises(UsageError, match="gone"):
        replay_options(settings, given)


def test_options_are_those_of_the_command_line():
    from wan.cli import COMMANDS, make_parser

    flags = {action.dest for action in make_parser()._actions}
    assert set(FLAGS) == flags - {"help", "version", *COMMANDS}


def test_solver_names_are_the_solvers():
    from wan.solvers import SOLVERS

    assert set(SOLVER_NAMES) == set(SOLVERS)
    assert set(RCM_NAMES) == {name for name, one in SOLVERS.items() if one.is_rcm}


def test_device():
    assert check_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="there is: cpu"):
        check_device("cuda:99")
