"""The flags of the caches on the command line: reports, traces, replay, messages."""

import json

import pytest
import torch
from wan.cache.coefficients import write_coefficients
from wan.cache.options import OPTIONS
from wan.cache.telemetry import read_trace

from wan.cli import main
from wan.media import read_settings

SMALL = ["--size", "48*48", "--frame_num", "5", "--sample_steps", "12", "--seed", "3", "--device", "cpu"]
CACHED = ["--fbcache", "--fb_thresh", "0.2", "--fb_cfg_sep_diff", "false"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def generate(capsys):
    """generate(*flags) -> (exit code, report or None, stderr without progress bars)"""

    def run(*flags):
        code = main([*flags])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "it/s]" not in line]
        return code, json.loads(out) if out.startswith("{") else None, lines

    return run


def test_a_cached_run(generate, folder):
    code, report, lines = generate(*SMALL, *CACHED, "--cache_trace", "t.jsonl", "--save_file", "a.mp4")
    assert code == 0 and report["steps"] == 12
    cond = report["cache"]["model"]["cond"]
    assert cond["total"] == 12 and 2 <= cond["skipped"] == 12 - cond["computed"] <= 10 and cond["failsafes"] == {}
    (summary,) = [line for line in lines if "summary" in line]
    assert summary.startswith(f"CacheManager[fbcache] summary: fbcache; cond {cond['skipped']} of 12 skipped, metric ")
    assert "; uncond " in summary and summary.endswith(" s saved")
    header, decisions = read_trace("t.jsonl")
    assert (header["task"], header["seed"], header["steps"]) == ("t2v-tiny", 3, 12)
    assert header["cache"]["fb_thresh"] == 0.2
    assert [one.branch for one in decisions] == ["cond", "uncond"] * 12
    assert sum(one.skipped for one in decisions) == 2 * cond["skipped"]
    assert sorted(item.name for item in folder.iterdir()) == ["a.mp4", "t.jsonl"]


def test_a_cache_that_skips_nothing_changes_nothing(generate):
    _, plain, _ = generate(*SMALL, "--quiet", "--save_file", "a.mp4")
    code, report, lines = generate(*SMALL, "--quiet", "--save_file", "b.mp4", "--teacache", "--teacache_thresh", "-0.5")
    assert code == 0 and lines == [] and "cache" not in plain
    assert report["sha256"] == plain["sha256"] and report["cache"]["model"]["cond"]["skipped"] == 0


def test_replay(generate):
    _, first, _ = generate(*SMALL, *CACHED, "--cache_trace", "t.jsonl", "--save_file", "a.mp4")
    settings = read_settings("a.mp4")
    assert settings["fbcache"] is True and settings["fb_thresh"] == 0.2 and settings["fb_cfg_sep_diff"] is False
    assert "cache_trace" not in settings and "teacache" not in settings
    code, again, _ = generate("--quiet", "--replay", "a.mp4", "--save_file", "b.mp4")
    assert code == 0 and again["sha256"] == first["sha256"]
    assert read_settings("b.mp4") == settings
    code, other, _ = generate("--quiet", "--replay", "a.mp4", "--fb_thresh", "0", "--save_file", "c.mp4")
    assert code == 0 and other["cache"]["model"]["cond"]["skipped"] == 0 and other["sha256"] != first["sha256"]
    code, other, _ = generate("--quiet", "--replay", "a.mp4", "--easycache", "--save_file", "d.mp4")
    assert code == 0 and "fbcache" not in read_settings("d.mp4") and read_settings("d.mp4")["easycache"] is True


def test_auto_is_replayed_as_what_it_chose(generate):
    small = [*SMALL, "--sample_steps", "20"]
    code, first, lines = generate(*small, "--cache", "auto", "--save_file", "a.mp4")
    assert code == 0 and [line for line in lines if "--cache auto, medium: --teacache" in line]
    settings = read_settings("a.mp4")
    assert settings["teacache"] is True and not {"cache", "cache_quality"} & settings.keys()
    code, again, _ = generate("--quiet", "--replay", "a.mp4", "--save_file", "b.mp4")
    assert code == 0 and again["sha256"] == first["sha256"] and again["cache"]["model"]["cond"]["skipped"] > 0


def test_coefficients_from_a_file(generate, folder):
    write_coefficients("c.json", {"any": {"magcache": {"ratios": {"model": [1.0] * 12}}}}, "")
    flags = ["--magcache", "--cache_coefficients", "c.json", "--mag_K", "2", "--save_file", "a.mp4"]
    code, report, _ = generate(*SMALL, "--quiet", *flags)
    assert code == 0 and report["cache"]["model"]["cond"]["skipped"] == 7  # ccSScSScSScS
    assert read_settings("a.mp4")["cache_coefficients"] == str(folder / "c.json")
    (folder / "c.json").write_text("{}")
    code, _, lines = generate("--quiet", "--replay", "a.mp4", "--replay_files", "--save_file", "b.mp4")
    assert code == 2 and len(lines) == 1 and "c.json: not a coefficients file" in lines[0]


def test_a_trace_that_cannot_be_written_keeps_the_video(generate, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan.cache.telemetry.Telemetry.write", full)
    code, _, lines = generate(*SMALL, "--quiet", *CACHED, "--cache_trace", "t.jsonl", "--save_file", "a.mp4")
    assert code == 1 and lines == ["error: --cache_trace: cannot write t.jsonl: No space left on device"]
    assert [item.name for item in folder.iterdir()] == ["a.mp4"]


A14B = ["--task", "t2v-A14B", "--ckpt_dir", ".", "--prompt", "a"]
WRONG = [
    (["--teacache_thresh", "0.1"], "--teacache_thresh has no effect without --teacache"),
    (["--fbcache", "--magcache"], "--fbcache and --magcache cannot go together"),
    (["--fbcache", "--sample_steps", "9"], "--fbcache harms a run of 9 steps"),
    (["--fbcache", "--denoising_step_list", "1000,750,500,250"], "--fbcache harms a run of 4 steps"),
    (["--fbcache", "--fb_ema", "1.5"], "--fb_ema must be from 0 to below 1, not 1.5"),
    (["--fbcache", "--fb_cfg_sep_diff", "maybe"], "must be true or false"),
    (["--fbcache", "--cache_device", "tpu"], "unknown --cache_device 'tpu'"),
    (["--fbcache", "--cache_trace", "."], " is a folder"),
    (["--fbcache", "--cache_trace", "no/t.jsonl"], "--cache_trace: no folder "),
    (["--fbcache", "--cache_trace", "a.mp4", "--save_file", "a.mp4"], "--cache_trace and --save_file both name a.mp4"),
    (["--cache", "auto", "--sample_steps", "19"], "nobody has measured t2v-tiny at 19 steps of unipc"),
    ([*A14B, "--cache", "auto"], "nobody has measured wan2.2-t2v-A14B at 40 steps of unipc"),
    (["--magcache", "--cache_coefficients", "none.json"], "none.json: not a coefficients file"),
    (
        [*A14B, "--teacache", "--teacache_policy", "polynomial"],
        "no teacache embedding coefficients are known for expert",
    ),
]


@pytest.mark.parametrize("flags, message", WRONG)
def test_wrong_requests_are_one_line_and_exit_2(generate, folder, flags, message):
    code, report, lines = generate("--quiet", *flags)
    assert code == 2 and report is None and len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not list(folder.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is asked for")
def test_a_cache_device_that_is_not_there_is_found_before_any_work(generate):
    code, _, lines = generate("--quiet", *CACHED, "--cache_device", "cuda")
    assert code == 2 and lines[0].startswith("error: --cache_device cuda is not on this machine; there is: cpu")


def test_warnings(generate):
    _, _, lines = generate("--dry_run", "--fbcache", "--teacache", "--teacache_policy", "cubic")
    assert [line for line in lines if line.startswith("warning: ")] == [
        "warning: --fbcache and --teacache: fbcache, which measures the change, decides alone",
        "warning: unknown --teacache_policy 'cubic'; linear is used (known: linear, polynomial, polynomial_projection)",
    ]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and all(f"--{name} " in text.replace("\n", " ") for name in OPTIONS)
