"""Options from a file."""

import json

import pytest

from wan.cli import main

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
