"""The task files hold the official defaults, and a broken one is reported by file and key."""

import pytest

from wan.errors import SwanError, UsageError
from wan.tasks import config_dir, grid_px, load_task, read_task, task_names

# steps, shift, guidance, frames, fps: from the official configs and command lines
OFFICIAL = {
    "t2v-1.3B": (50, 5.0, 5.0, 81, 16),
    "t2v-14B": (50, 5.0, 5.0, 81, 16),
    "i2v-14B": (40, 5.0, 5.0, 81, 16),
    "flf2v-14B": (50, 16.0, 5.0, 81, 16),
    "vace-1.3B": (50, 16.0, 5.0, 81, 16),
    "vace-14B": (50, 16.0, 5.0, 81, 16),
    "vace-A14B": (50, 12.0, [5.0, 5.0], 81, 16),
    "t2v-A14B": (40, 12.0, [3.0, 4.0], 81, 16),
    "i2v-A14B": (40, 5.0, [3.5, 3.5], 81, 16),
    "ti2v-5B": (50, 5.0, 5.0, 121, 24),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sampling_defaults(name):
    s = load_task(name).sampling
    assert (s.steps, s.shift, s.guide_scale, s.frame_num, s.fps) == OFFICIAL[name]
    assert s.size in s.sizes


def test_negative_prompts_are_the_official_ones():
    t2v = load_task("t2v-1.3B").negative_prompt
    assert t2v.startswith("色调艳丽，过曝，静态") and t2v.endswith("背景人很多，倒着走")
    assert load_task("i2v-14B").negative_prompt == "镜头晃动，" + t2v
    assert load_task("flf2v-14B").negative_prompt == "镜头切换，镜头晃动，" + t2v


def test_grid_and_experts():
    assert [grid_px(load_task(name)) for name in ("t2v-14B", "ti2v-5B")] == [16, 32]
    assert load_task("t2v-A14B").boundary == 0.875 and load_task("i2v-A14B").boundary == 0.9
    assert load_task("t2v-A14B").experts == {"low": "low_noise_model", "high": "high_noise_model"}


def test_eps_is_a_number():
    assert {load_task(name).dit.eps for name in task_names()} == {1e-6}  # "1e-6" in YAML is text


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(UsageError, match="t2v-9B.*ti2v-5B"):
        load_task("t2v-9B")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("  num_heads: 12\n", "", "key dit.num_heads is missing"),
        ("  num_heads: 12\n", "  num_heads: many\n", "dit.num_heads must be int"),
        ("  num_heads: 12\n", "  num_heads: 12\n  heads: 3\n", "unknown key dit.heads"),
        ("  guide_scale: 5.0", "  guide_scale: [3.0, 4.0]", "guide_scale"),
        ("kind: t2v\n", "kind: v2v\n", "kind must be one of"),
        ("kind: t2v\n", "kind: [t2v\n", "while parsing"),
    ],
)
def test_broken_task_file_names_file_and_key(tmp_path, old, new, message):
    text = (config_dir("tasks") / "t2v-1.3B.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "t2v-1.3B.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SwanError) as caught:
        read_task(path)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)
