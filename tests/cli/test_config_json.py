"""generate.py --config_json: a configuration of LightX2V, as its users have it."""

import json

import pytest

from wan.cli import main
from wan.compat.lightx2v import LightX2VPipeline
from wan.media import read_settings

CONFIG = {
    "infer_steps": 3,
    "target_video_length": 5,
    "text_len": 512,
    "target_height": 48,
    "target_width": 80,
    "self_attn_1_type": "torch_sdpa",
    "cross_attn_1_type": "torch_sdpa",
    "sample_guide_scale": 6,
    "sample_shift": 8,
    "enable_cfg": True,
    "cpu_offload": True,
    "offload_granularity": "phase",
    "seed": 4,
    "fps": 12,
}
PROMPT = "a red circle moving right on a black background"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(config, *flags) -> (exit code, stdout, stderr without progress)."""
    monkeypatch.chdir(tmp_path)

    def of(config, *flags):
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "c.json").write_text(text)
        code = main(["--config_json", "c.json", "--device", "cpu", *flags])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if "%|" not in line]

    return of


def test_a_video_of_a_configuration(run, tmp_path):
    """Its settings are those of the file, but for flags beside it; what has no effect is told."""
    code, out, err = run(CONFIG, "--sample_steps", "2", "--prompt", PROMPT, "--save_file", "a.mp4")
    assert code == 0 and "warning: c.json: text_len 512: has no effect: t2v-tiny has 32" in err
    settings, report = read_settings(tmp_path / "a.mp4"), json.loads(out)
    assert {name: settings[name] for name in ("sample_steps", "frame_num", "size", "sample_shift", "seed", "fps")} == {
        "sample_steps": 2,
        "frame_num": 5,
        "size": "80*48",
        "sample_shift": 8,
        "seed": 4,
        "fps": 12,
    }
    assert settings["sample_guide_scale"] == 6 and report["offload"] == "phase"


def test_it_means_what_it_means_to_the_class(run):
    """One table: the options of a file are those of create_generator(config_json=)."""
    code, out, _ = run(CONFIG, "--dry_run", "--json")
    plan = json.loads(out)
    with LightX2VPipeline(model_path=plan_folder(), model_cls="wan2.1", task="t2v") as pipe, pytest.warns(UserWarning):
        pipe.create_generator(config_json="c.json")
        theirs = pipe.engine.plan(prompt=PROMPT, sample_steps=3, size="80*48", frame_num=5, fps=12)
    assert code == 0 and [plan[name] for name in ("steps", "size", "frames", "fps")] == [3, "80x48", 5, 12]
    assert theirs["placement"]["offload"] == plan["placement"]["offload"] == "phase"


def plan_folder():
    from wan.tasks import embedded_checkpoint, load_task

    return str(embedded_checkpoint(load_task("t2v-tiny")))


def test_its_task_and_model(run):
    """Keys of LightX2V's command line may be in the file."""
    model = {"model_cls": "wan2.1", "task": "t2v", "model_path": plan_folder()}
    code, out, _ = run({**CONFIG, **model}, "--dry_run", "--json")
    assert code == 0 and json.loads(out)["task"] == "t2v-tiny"
    code, out, err = run({**CONFIG, **model, "task": "i2v"}, "--dry_run")
    assert code != 0 and err[-1].startswith("error: ")


@pytest.mark.parametrize(
    "config, code, line",
    [
        ({"infer_stepz": 4}, 2, "error: c.json: unknown key 'infer_stepz'; is it infer_steps?"),
        ({"infer_steps": "4"}, 2, "error: c.json: infer_steps must be a whole number, not '4'"),
        ({"infer_steps": 4000}, 2, "error: c.json: infer_steps must be a whole number from 1 to 1000, not 4000"),
        ({"target_height": 50, "target_width": 64}, 2, "error: c.json: target_height and target_width 64*50: t2v-tiny"),
        ({"parallel": {"seq_p_size": 2}}, 2, "error: c.json: parallel: --ring_size 1 --ulysses_size 2 needs 2"),
        ({"refert_num": 1}, 2, None),
        ({"feature_caching": "Mag", "magcache_K": 0, "infer_steps": 20}, 2, "error: c.json: magcache_K must be"),
        ({"dit_original_ckpt": "gone"}, 2, "error: c.json: dit_original_ckpt: no file gone"),
        ({"model_cls": "hunyuan_video_1.5"}, 2, "error: c.json: model_cls 'hunyuan_video_1.5' is not here: Hunyuan"),
        ({"audio_sr": 16000}, 2, "error: c.json: audio_sr 16000: is of SekoTalk, which is not here"),
        ('{"seed": 1, "seed": 2}', 1, "error: --config_json: c.json is neither JSON nor YAML: duplicate name seed"),
        ("[1]", 2, "error: --config_json: c.json must hold keys of LightX2V"),
    ],
)
def test_wrong_configurations_are_one_line(run, config, code, line):
    got, out, err = run(config, "--dry_run")
    if line is None:  # of another task: told, for files are shared among tasks
        assert got == 0 and any("refert_num 1: has no effect with this model and task" in one for one in err)
        return
    assert (got, out) == (code, "") and err[-1].startswith(line), err


def test_it_excludes_other_files(run):
    code, _, err = run(CONFIG, "--config", "c.yaml")
    assert code == 2 and err == ["error: --config_json and --config contradict each other: give one"]
    assert main(["--config_json", "gone.json"]) == 2
