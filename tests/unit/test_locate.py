import sys

import pytest

from wan.errors import SwanError, UsageError
from wan.tasks import load_task
from wan.weights.locate import locate

T5, VAE, CLIP = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", load_task("i2v-14B").files.clip


def lay_out(root, *files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names(root, paths):
    return [str(path.relative_to(root)) for path in paths]


def test_official_folder_of_one_transformer(tmp_path):
    lay_out(tmp_path, T5, VAE, "config.json", "google/umt5-xxl/tokenizer.json", "diffusion_pytorch_model.safetensors")
    files = locate(tmp_path, load_task("t2v-1.3B"))
    assert names(tmp_path, files.dit["model"]) == ["diffusion_pytorch_model.safetensors"] and list(files.dit) == [
        "model"
    ]
    assert names(tmp_path, files.vae + files.t5) == [VAE, T5]
    assert files.tokenizer == tmp_path / "google/umt5-xxl" and files.clip is None


def test_official_folder_with_shards_and_clip(tmp_path):
    shards = [f"diffusion_pytorch_model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    lay_out(tmp_path, T5, VAE, CLIP, "google/umt5-xxl/spiece.model", *shards)
    files = locate(tmp_path, load_task("i2v-14B"))
    assert names(tmp_path, files.dit["model"]) == shards and names(tmp_path, files.clip) == [CLIP]
    lay_out(tmp_path, "diffusion_pytorch_model.safetensors.index.json")
    files = locate(tmp_path, load_task("i2v-14B"))
    assert names(tmp_path, files.dit["model"]) == ["diffusion_pytorch_model.safetensors.index.json"]


def test_official_folder_of_two_experts(tmp_path):
    experts = [f"{one}_noise_model/diffusion_pytorch_model.safetensors" for one in ("low", "high")]
    lay_out(tmp_path, T5, VAE, "google/umt5-xxl/spiece.model", *experts)
    files = locate(tmp_path, load_task("t2v-A14B"))
    assert {name: names(tmp_path, paths) for name, paths in files.dit.items()} == {
        "low": [experts[0]],
        "high": [experts[1]],
    }


def test_diffusers_folder(tmp_path):
    weights = [f"{folder}/model.safetensors" for folder in ("transformer", "transformer_2", "vae", "text_encoder")]
    lay_out(tmp_path, *weights, "tokenizer/tokenizer.json", "model_index.json")
    files = locate(tmp_path, load_task("t2v-A14B"))
    assert names(tmp_path, files.dit["high"]) == weights[:1] and names(tmp_path, files.dit["low"]) == weights[1:2]
    assert names(tmp_path, files.vae + files.t5) == weights[2:] and files.tokenizer == tmp_path / "tokenizer"
    assert names(tmp_path, locate(tmp_path, load_task("t2v-14B")).dit["model"]) == weights[:1]
    with pytest.raises(SwanError, match="clip is missing; looked for .*image_encoder/"):
        locate(tmp_path, load_task("i2v-14B"))


def test_safetensors_in_place_of_pth(tmp_path):
    lay_out(tmp_path, "Wan2.1_VAE.safetensors", T5, "tokenizer/tokenizer.json", "wan_t2v.safetensors")
    files = locate(tmp_path, load_task("t2v-14B"))
    assert names(tmp_path, files.vae + files.dit["model"]) == ["Wan2.1_VAE.safetensors", "wan_t2v.safetensors"]
    lay_out(tmp_path, "wan_i2v.safetensors")
    with pytest.raises(SwanError, match="cannot tell which file is the transformer .wan_i2v.safetensors, wan_t2v"):
        locate(tmp_path, load_task("t2v-14B"))


@pytest.mark.parametrize(
    "absent, words", [(T5, "t5 is missing"), (VAE, "vae is missing"), ("dit", "transformer is mis")]
)
def test_what_is_missing_is_named_with_what_is_there(tmp_path, absent, words):
    parts = {T5: T5, VAE: VAE, "dit": "diffusion_pytorch_model.safetensors", "tok": "google/umt5-xxl/tokenizer.json"}
    lay_out(tmp_path, *(path for name, path in parts.items() if name != absent))
    with pytest.raises(SwanError, match=f"{words}.*; looked for .*, found .*google/") as error:
        locate(tmp_path, load_task("t2v-14B"))
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_missing_expert_and_tokenizer(tmp_path):
    lay_out(tmp_path, T5, VAE, "low_noise_model/a.safetensors", "google/umt5-xxl/special_tokens_map.json")
    with pytest.raises(SwanError, match="high-noise expert is missing; looked for high_noise_model/"):
        locate(tmp_path, load_task("t2v-A14B"))
    lay_out(tmp_path, "high_noise_model/a.safetensors")
    with pytest.raises(SwanError, match="tokenizer is missing; looked for google/umt5-xxl/ and tokenizer/"):
        locate(tmp_path, load_task("t2v-A14B"))


def test_overrides(tmp_path):
    lay_out(tmp_path / "a", T5, VAE, "google/umt5-xxl/tokenizer.json")
    lay_out(tmp_path / "b", "high.gguf", "low.safetensors", "vae/x.safetensors")
    b = tmp_path / "b"
    given = {"high": b / "high.gguf", "low": b / "low.safetensors", "vae": b / "vae"}
    files = locate(tmp_path / "a", load_task("i2v-A14B"), given)
    assert files.dit == {"low": [b / "low.safetensors"], "high": [b / "high.gguf"]}
    assert files.vae == [b / "vae/x.safetensors"] and files.t5 == [tmp_path / "a" / T5]
    assert locate(tmp_path / "a", load_task("t2v-14B"), {"dit": b / "low.safetensors"}).dit["model"][0].parent == b


def test_overrides_can_replace_the_folder(tmp_path):
    lay_out(tmp_path, "d.safetensors", "v.safetensors", "t.safetensors", "tok/spiece.model")
    given = {"dit": "d.safetensors", "vae": "v.safetensors", "t5": "t.safetensors", "tokenizer": "tok"}
    given = {name: tmp_path / path for name, path in given.items()}
    assert locate(None, load_task("t2v-14B"), given).tokenizer == tmp_path / "tok"
    del given["vae"]
    with pytest.raises(UsageError, match="needs a checkpoint folder or hub id for: vae"):
        locate(None, load_task("t2v-14B"), given)


@pytest.mark.parametrize(
    "task, overrides, match",
    [
        ("t2v-A14B", {"dit": "x"}, "has two experts, give high and low"),
        ("t2v-14B", {"high": "x"}, "has one transformer, give dit"),
        ("t2v-14B", {"unet": "x"}, "allowed: dit, high, low"),
        ("t2v-14B", {"dit": "x"}, "no such file or folder: x"),
    ],
)
def test_wrong_overrides(tmp_path, monkeypatch, task, overrides, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=match):
        locate(tmp_path, load_task(task), overrides)


@pytest.mark.parametrize("folder", ["./absent", "/absent/folder", "absent", "a/b/c", "~/no/such/folder"])
def test_an_absent_folder_is_a_usage_error(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such checkpoint folder"):
        locate(folder, load_task("t2v-14B"))


def test_a_file_is_no_folder(tmp_path):
    lay_out(tmp_path, "x.safetensors")
    with pytest.raises(UsageError, match="is a file"):
        locate(tmp_path / "x.safetensors", load_task("t2v-14B"))


def test_hub_ids_are_downloaded_with_only_what_the_task_needs(tmp_path, monkeypatch):
    lay_out(tmp_path, T5, VAE, "google/umt5-xxl/tokenizer.json", "diffusion_pytorch_model.safetensors")
    calls = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    files = locate("Wan-AI/Wan2.1-T2V-14B@v1/x", load_task("t2v-14B"))
    assert names(tmp_path, files.vae) == [VAE]
    repo, revision, patterns = calls[0]
    assert (repo, revision) == ("Wan-AI/Wan2.1-T2V-14B", "v1/x")
    assert {T5, VAE, "google/umt5-xxl/*", "diffusion_pytorch_model*", "transformer/*"} <= set(patterns)
    assert "transformer_2/*" not in patterns and "image_encoder/*" not in patterns


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SwanError, match="no folder some-org/no-such-model here, and it cannot be had") as error:
        locate("some-org/no-such-model", load_task("t2v-14B"))
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SwanError, match="huggingface_hub is not installed"):
        locate("org/name", load_task("t2v-14B"))
