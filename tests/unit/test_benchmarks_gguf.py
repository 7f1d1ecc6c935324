"""The benchmarks of quantised weights, at small sizes."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import tiny_world, tiny_world_gguf
from wan.quant.dequantize import dequantize
from wan.quant.ggml import BY_NAME
from wan.weights.containers.gguf import GGUFSource
from wan.weights.write.export import Planned

ROW_KEYS = {"type", "bytes", "bytes_per_weight", "in_blocks", "tensors", "same_weights_as"}
ROW_KEYS |= {"load_seconds", "seconds_per_clip", "peak_bytes", "psnr_db", "psnr_db_least"}
ROW_KEYS |= {*tiny_world.WORDS, "background", "color_shape_direction"}


def test_tiny_world_in_gguf_types(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tiny_world_gguf, "in_fresh_process", lambda function, *args: function(*args))
    monkeypatch.setattr(tiny_world_gguf, "LOADS", 1)
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    files = ["--out", str(out), "--picture", str(picture)]
    assert tiny_world.main(["--gguf-types", "Q8_0,q4_k_m,Q6_K,fp8,MLX4", "--clips", "1", "--steps", "2", *files]) == 0
    result = json.loads(out.read_text())
    assert (result["clips"], result["steps"], result["dtype"]) == (1, 2, "fp32")
    rows = {row["type"]: row for row in result["types"]}
    assert list(rows) == ["reference", "Q8_0", "Q4_K_M", "Q6_K", "fp8", "mlx4"]
    assert all(row.keys() == ROW_KEYS for row in rows.values())
    assert rows["fp8"]["in_blocks"] > 0.85 and rows["mlx4"]["bytes"] < rows["fp8"]["bytes"] < rows["reference"]["bytes"]
    assert rows["reference"]["in_blocks"] == 0 and rows["reference"]["psnr_db"] is None
    assert rows["Q8_0"]["tensors"] == {"F32": 111, "Q8_0": 60, "BF16": 6} and rows["Q8_0"]["psnr_db"] > 35
    # Only rows of 768 are whole K blocks, and of these tensors both recipes say Q6_K.
    assert rows["Q4_K_M"]["tensors"] == {"F32": 111, "F16": 54, "Q6_K": 6, "BF16": 6}
    assert rows["Q6_K"]["same_weights_as"] == "Q4_K_M" and rows["Q6_K"]["psnr_db"] == rows["Q4_K_M"]["psnr_db"]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 8 and table[3].endswith("111 F32, 60 Q8_0, 6 BF16")
    assert Image.open(picture).size[1] > 4 * 128


def test_psnr():
    frames = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8).numpy()
    assert tiny_world_gguf.psnr(frames, frames) == tiny_world_gguf.SAME_DB
    assert tiny_world_gguf.psnr(frames, frames + 1) == pytest.approx(48.13, abs=0.01)


def test_unknown_names(capsys):
    assert tiny_world.main(["--gguf-types", "Q8_0,Q9"]) == 2
    assert capsys.readouterr().err.startswith("error: --gguf-types: no type 'Q9'; types: F32, F16")
    pytest.importorskip("diffusers")
    from benchmarks import peers

    assert peers.main(["gguf", "--types", "Q9"]) == 2
    assert peers.main(["gguf", "--types", "F16"]) == 2  # nothing quantised
    assert peers.main(["gguf", "--runs", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("error: --types Q9: no such type; types: Q8_0")


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q5_1", "Q2_K", "Q6_K"])
def test_random_blocks_are_plausible_weights(name):
    pytest.importorskip("diffusers")
    from benchmarks.peers_gguf import WEIGHT_STD, random_data

    planned = Planned("blocks.0.ffn.0.weight", (64, 1024), BY_NAME[name], "")
    weights = dequantize(random_data(planned, seed=1).view(64, -1), planned.type)
    assert weights.std().item() == pytest.approx(WEIGHT_STD, rel=0.1)
    assert abs(weights.mean().item()) < WEIGHT_STD / 10


def test_peers_compute_the_same(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    from benchmarks import peers_gguf
    from benchmarks.peers import DIT

    monkeypatch.setattr(peers_gguf, "PAUSE_SECONDS", 0)
    config = DIT | {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 1, "text_dim": 64, "text_len": 16}
    result = peers_gguf.compare("Q4_K", config, [(1, 4, 4), (2, 4, 6)], runs=1)
    json.dumps(result)
    assert result["types"] == {"F32": 26, "Q4_K": 10, "F16": 6} and result["file_bytes"] > 0
    for one in result["forwards"]:
        differences = one["max_difference_over_std"]
        assert differences["ours_bf16"] == 0 and 0 < differences["diffusers"] < 0.2
        assert all(len(one["seconds"][side]) == 1 for side in peers_gguf.SIDES)
        assert one["floor"]["seconds"]["ours"] > one["floor"]["seconds"]["ours_bf16"] > 0
    assert result["forward_ratio"].keys() == result["forward_over_ours_bf16"].keys() == {"4", "12"}
    assert result["rss_ratio"].keys() == {"ready", "after_forwards"} and result["ready_ratio"] > 0
    for side in peers_gguf.SIDES:
        peaks = list(result["peak_bytes"][side].values())
        assert len(peaks) == 3 and peaks == sorted(peaks)

    config |= {"num_layers": 2, "dim": 512}
    peers_gguf.write_random(tmp_path / "a.gguf", config, "Q4_K_M")
    source = GGUFSource(tmp_path / "a.gguf")
    assert source.type("blocks.1.ffn.2.weight").name == "Q6_K" and source.is_quantized()


def test_a_side_that_fails_is_named(tmp_path):
    pytest.importorskip("diffusers")
    from benchmarks.peers_gguf import Server
    from wan.errors import SwanError

    with pytest.raises(SwanError, match="ours: its process ended with exit code 1"):
        Server("ours", tmp_path / "none.gguf", tmp_path)
