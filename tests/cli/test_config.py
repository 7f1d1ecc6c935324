"""Options from a file."""

import json
from pathlib import Path

import pytest
import yaml
from wan.cache.options import OPTIONS as OPTIONS_OF_CACHES
from wan.cache.options import check_coefficients, check_options

from wan.cli import main
from wan.options import build_request
from wan.options.config import config_options
from wan.tasks import load_task

OPTIONS = {"task": "t2v-tiny", "seed": 5, "sample_steps": 4, "size": "96*64", "lora": [["gone.safetensors", 1.0]]}


def plan(capsys, *argv):
    assert main([*argv, "--dry_run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    return {name: told[name] for name in ("task", "seed", "steps", "size", "fps")}


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_flags_beside_it_override(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_text(json.dumps({**OPTIONS, "lora": None}))
    wanted = plan(capsys, "--task", "t2v-tiny", "--seed", "5", "--sample_steps", "6", "--size", "96*64", "--fps", "4")
    assert plan(capsys, "--config", str(path), "--sample_steps", "6", "--fps", "4") == wanted


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("a: 1", 2, "unknown option a"),
        ("- 1", 2, "must hold options by their names"),
        ("", 2, "must hold options by their names"),
        ("a: [", 1, "neither JSON nor YAML"),
        ("a: !!python/object/apply:os.system [ls]", 1, "neither JSON nor YAML"),
        ("\0", 1, "neither JSON nor YAML"),
        ("seed: 1\nfps: 2\nseed: 3", 1, "duplicate name seed"),
        ("replay: a.mp4", 2, "unknown option replay"),
        ("sample_steps: many", 2, "--sample_steps must be a whole number"),
        ("size: {width: 3}", 2, "--size must be"),
        (json.dumps(OPTIONS), 2, "--lora: no file gone.safetensors"),
        ("#" * (1 << 20) + "\nseed: 1", 2, "larger than"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, capsys, text, code, line):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    assert main(["--config", str(path)]) == code
    told = capsys.readouterr().err.strip()
    assert line in told and "\n" not in told


def test_no_such_file(capsys):
    assert main(["--config", "gone.yaml"]) == 2
    assert "--config: no file gone.yaml" in capsys.readouterr().err


RECIPES = sorted((Path(__file__).parents[2] / "configs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_act(path):
    """Each of their options is another one in the request of a task that it is for."""
    task = {"cached-experts": "i2v-tiny", "distilled": "i2v-tiny"}.get(path.stem, "t2v-tiny")
    ranks = 8 if path.stem == "parallel-8" else 1
    given = {"task": task, "seed": 1, "sample_steps": None if path.stem == "distilled" else 20}
    options = config_options(str(path), given)
    if path.stem == "cached-experts":
        options["mag_ratios"] = [1.0, *[0.99] * 19]  # of t2v-A14B and i2v-A14B some come along
    recipe = yaml.safe_load(path.read_text())
    whole = build_request(options, ranks)
    for name in recipe.keys() - {"magcache", "teacache"}:
        less = build_request({one: value for one, value in options.items() if one != name}, ranks)
        assert (less.load, less.sample) != (whole.load, whole.sample) or recipe[name] == OPTIONS_OF_CACHES[name].default
    assert bool(whole.sample.cache) == path.stem.startswith("cached")


def test_cached_experts_is_for_the_models_whose_ratios_come_along():
    path = next(one for one in RECIPES if one.stem == "cached-experts")
    for task in ("t2v-A14B", "i2v-A14B"):
        spec = load_task(task)
        given = {name: value for name, value in config_options(str(path), {}).items() if name in OPTIONS_OF_CACHES}
        options, _ = check_options(given, spec.sampling.steps)
        assert check_coefficients(options, spec.coefficients, ("high", "low"))["ratios"].keys() == {"high", "low"}
