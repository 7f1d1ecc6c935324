"""A video of somebody else that is made again: it says how to sample, and nothing about this machine."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.mutations import BATCHES, survive
from wan.cli import main
from wan.errors import SwanError, UsageError
from wan.media import read_settings, write_video
from wan.options import FLAGS, STORED, build_request
from wan.options.replay import replay_options
from wan.pictures import image_sha256
from wan.tasks import embedded_checkpoint, load_task

TASK = {"task": "t2v-tiny", "prompt": "a red circle", "seed": 1}
HUB = "Wan-AI/Wan2.1-T2V-1.3B"
TINY = embedded_checkpoint(load_task("t2v-tiny"))
STRIPES = str(TINY / "loras" / "stripes.safetensors")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def replay(folder, capsys):
    """replay(settings, *flags) -> (exit code, stderr) of a plan for a video with these settings."""

    def run(settings, *flags):
        write_video("v.png", np.zeros((1, 16, 16, 3), np.uint8), 8, TASK | settings)
        capsys.readouterr()
        code = main(["--replay", "v.png", "--dry_run", *flags])
        return code, capsys.readouterr().err

    return run


def test_a_video_does_not_say_where_to_write(folder, capsys):
    (folder / "precious.mp4").write_text("precious")
    (folder / "profile").write_text("precious")
    evil = TASK | {"save_file": str(folder / "precious.mp4"), "frame_num": 5, "sample_steps": 10, "size": "32*32"}
    evil |= {"teacache": True, "cache_trace": str(folder / "profile")}
    write_video("evil.mp4", np.zeros((5, 16, 16, 3), np.uint8), 8, evil)
    assert main(["--replay", "evil.mp4"]) == 0
    out, err = capsys.readouterr()
    assert (folder / "precious.mp4").read_text() == (folder / "profile").read_text() == "precious"
    assert json.loads(out)["file"].startswith(str(folder / "t2v-tiny_32x32_1_"))
    assert "warning: not taken from the video: cache_trace, save_file\n" in err


@pytest.mark.parametrize(
    "settings, flags, code, message",
    [
        ({"ckpt_dir": HUB}, [], 2, f"the video was made from {HUB}: add --ckpt_dir {HUB}\n"),
        ({"task": "t2v-1.3B", "ckpt_dir": HUB}, ["--replay_files"], 2, f"made from {HUB}: add --ckpt_dir {HUB}\n"),
        ({"task": "t2v-1.3B", "ckpt_dir": HUB}, ["--ckpt_dir", HUB], 0, ""),
        (
            {"ckpt_dir": "/a/b"},
            [],
            2,
            "made from /a/b: add --ckpt_dir /a/b, or --replay_files to use all files that it",
        ),
        ({"ckpt_dir": str(TINY)}, [], 0, ""),
        ({"vae": "/a/vae.pth", "t5": "/a/b c"}, [], 2, "add --vae /a/vae.pth --t5 '/a/b c', or --replay_files"),
        ({"vae": "/a/vae.pth"}, ["--replay_files"], 2, "--vae: no file /a/vae.pth"),
        ({"vae": "/a/vae.pth"}, ["--vae", str(TINY / "Wan2.1_VAE.pth")], 0, ""),
        ({"lora": [["/a/$(b).st", 0.5], ["/c", 1.0]]}, [], 2, "add --lora '/a/$(b).st:0.5' --lora /c:1.0, or"),
        ({"lora": [[STRIPES, 0.5]]}, [], 0, ""),
        ({"lora": [["/a", 0.5]]}, ["--lora", STRIPES], 0, ""),
        ({"lora": [[f"{TINY}/../../../tests/a", 0.5]]}, [], 2, "add --lora"),
        ({"lora": [STRIPES]}, [], 1, "settings in the video are damaged: lora"),
        ({"tokenizer": "/a"}, [], 2, "add --tokenizer /a"),
        ({"magcache": True, "cache_coefficients": "/c.json"}, [], 2, "add --cache_coefficients /c.json"),
        ({"ckpt_dir": "/\x1b[2Ja"}, [], 2, "made from /\\x1b[2Ja: add"),
        (
            {"new": 1, "offload": "block", "preset": "x", "gguf": "/a"},
            [],
            0,
            "not taken from the video: gguf, new, off",
        ),
        ({"image_sha256": 5}, [], 1, "damaged: image_sha256"),
        ({"sample_guide_scale": []}, [], 2, "--sample_guide_scale must be one number"),
    ],
)
def test_files_that_only_the_video_names(replay, settings, flags, code, message):
    found, err = replay(settings, *flags)
    assert found == code and message in err and err.count("\n") == bool(err)


def test_replay_files_needs_a_replay(capsys):
    assert main(["--replay_files"]) == 2
    assert capsys.readouterr().err == "error: --replay_files is for --replay FILE\n"


def test_pictures_are_known_by_their_hash(folder):
    Image.new("RGB", (64, 64), "red").save("red.png")
    path = str(folder / "red.png")
    settings = TASK | {"task": "i2v-tiny", "image": path}
    with pytest.raises(UsageError, match=f"made from {path}: add --image {path}, or --replay_files"):
        replay_options(settings, {})
    assert replay_options(settings, {}, files=True)["image"] == path
    proven = settings | {"image_sha256": {"image": image_sha256(path)}}
    assert replay_options(proven, {})["image"] == path
    with pytest.raises(SwanError, match="changed since"):
        replay_options(settings | {"image_sha256": {"image": ["x"]}}, {})
    with pytest.raises(UsageError, match="add --image //host/red.png"):  # another machine, on Windows
        replay_options(proven | {"image": "//host/red.png"}, {})
    with pytest.raises(UsageError, match="the image of the stored run is gone: /dev/zero"):
        replay_options(proven | {"image": "/dev/zero"}, {})


ODD = [True, 5, -1, 1.5, float("inf"), float("nan"), "x", "1" * 5000, "a\0b", "\ud800", 10**300, {"a": 1}]
ODD += [[], [1], [[]], [["x", 1]], [["x", "y"]], [[1, 2, 3]], ["x"] * 1000]


@pytest.mark.parametrize("name", [*FLAGS, "image_sha256", "swan", "other"])
def test_values_of_any_kind(name):
    """Each is refused in one line that names its option, or is one that it may have, or is not looked at."""
    for value in ODD:
        try:
            build_request(replay_options(TASK | {name: value}, {}))
        except SwanError as error:
            line = str(error)
            assert name in line and "\n" not in line and len(line) < 1000, (value, line)
        else:
            assert name not in ("ckpt_dir", "vae", "lora", "image") or value == []


def test_python_callers_give_the_same_kinds(folder):
    (folder / "weights").mkdir()
    options = {"task": "t2v-tiny", "ckpt_dir": folder / "weights", "fps": np.int64(8), "sample_guide_scale": (3,)}
    request = build_request(options)
    assert request.load.ckpt_dir == str(folder / "weights") and request.sample.fps == 8
    with pytest.raises(UsageError, match="--t5_cpu must be true or false, not 'yes'"):
        build_request({"t5_cpu": "yes"})


def test_settings_are_what_a_replay_takes():
    request = build_request({"teacache": True, "cache_trace": "t.jsonl", "offload": "none", "save_file": "a.mp4"})
    assert set(request.settings()) <= {*STORED, "swan", "image_sha256"}
    assert "cache_trace" not in request.settings()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # its pixels are never looked at
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def box(kind, contents, size=None):
    return struct.pack(">I", 8 + len(contents) if size is None else size) + kind + contents


def mp4(comment, **boxes):
    data = boxes.get("data", box(b"data", struct.pack(">II", 1, 0) + comment))
    lists = box(b"meta", bytes(4) + box(b"hdlr", bytes(25)) + box(b"ilst", box(b"\xa9cmt", data)))
    return box(b"ftyp", b"isom") + boxes.get("more", b"") + box(b"moov", box(b"udta", lists))


TEXT = json.dumps(TASK).encode()
LARGE_SIZE = struct.pack(">I4sQ", 1, b"free", 24) + bytes(8)
CONTAINERS = {
    "text.png": (png(chunk(b"tEXt", b"comment\0" + TEXT)), None),
    "unicode.png": (png(chunk(b"iTXt", b"comment\0\0\0en\0\0" + TEXT)), None),
    "compressed.png": (png(chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(1 << 24)))), "comment is compressed"),
    "long.png": (png(chunk(b"tEXt", b"comment\0" + bytes(2 << 20))), "comment has 2,097,152 bytes"),
    "claim.png": (png(struct.pack(">I", 0x7FFFFFFF) + b"tEXtcomment\0"), "comment has 2,147,483,639 bytes"),
    "none.png": (png(), "it has no comment"),
    "many.png": (png(chunk(b"tEXt", b"a\0b") * 20_000), "it has no comment"),
    "named.mp4": (png(chunk(b"tEXt", b"comment\0" + TEXT)), None),  # told by what it is, not by its name
    "plain.mp4": (mp4(TEXT), None),
    "bom.mp4": (mp4(b"\xef\xbb\xbf" + TEXT), None),
    "large_size.mp4": (mp4(TEXT, more=LARGE_SIZE), None),
    "beyond.mp4": (mp4(TEXT, data=box(b"data", TEXT, 1 << 30)), "it is no mp4, or a damaged one"),
    "empty_box.mp4": (mp4(TEXT, more=box(b"free", b"", 3)), "it is no mp4, or a damaged one"),
    "many.mp4": (mp4(TEXT, more=box(b"free", b"") * 20_000), "it has no comment"),
    "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://localhost:1/a.ts\n", "no mp4"),
    "deep.mp4": (mp4(b"[" * 60_000 + b"]" * 60_000), "nested too deeply"),
    "number.mp4": (mp4(b'{"task": 5}'), "its comment is something else"),
    "binary.mp4": (mp4(b"\xff\xfe{}"), "holds no Swan settings"),
    "concat:a.mp4": (b"", "it has no comment"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(folder, name):
    content, message = CONTAINERS[name]
    (folder / name).write_bytes(content)
    if message is None:
        assert read_settings(name) == TASK
        return
    with pytest.raises(SwanError, match=f"{name} holds no Swan settings: .*{message}|{message}") as caught:
        read_settings(name)
    assert caught.value.exit_code == 1


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """An mp4 and a PNG as Swan writes them, with much that can become wrong, and bare ones of nothing but settings."""
    path = tmp_path_factory.mktemp("videos")
    request = build_request({"seed": 1, "prompt": "a red circle", "teacache": True, "lora": [STRIPES], "vae": TINY})
    settings = request.settings() | {"denoising_step_list": [1000, 500], "sample_guide_scale": 3}
    for name in ("a.mp4", "a.png"):
        write_video(path / name, np.zeros((1, 16, 16, 3), np.uint8), 8, settings)
    text = json.dumps(settings).encode()
    return [
        (path / "a.mp4").read_bytes(),
        (path / "a.png").read_bytes(),
        mp4(text),
        png(chunk(b"tEXt", b"comment\0" + text)),
    ]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_videos(folder, videos, batch):
    known = []

    def attempt(data):
        (folder / "v").write_bytes(data)
        if (settings := read_settings("v")) in known:  # most damage is elsewhere in the file
            return
        known.append(settings)
        request = build_request(replay_options(settings, {}), replayed="v")
        assert request.output.save_file.startswith(f"{folder}/{request.load.task}_") and not request.sample.cache.get(
            "cache_trace"
        )
        assert all(path.startswith(str(TINY)) for path in (request.load.ckpt_dir, *request.load.files.values()))

    survive(videos, batch, attempt)
    assert [item.name for item in folder.iterdir()] == ["v"]
