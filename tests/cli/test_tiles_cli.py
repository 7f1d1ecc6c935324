"""The VAE in tiles where whole frames do not fit: the same video as with the flag, and stored in it."""

import json

from wan.cli import main
from wan.media import read_settings

RUN = ("--sample_steps", "2", "--frame_num", "1", "--size", "256*256", "--seed", "1", "--device", "cpu", "--quiet")


def test_tiles_that_the_plan_chose_are_stored_and_replayed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def made(*flags):
        assert main([*flags, "--quiet"]) == 0
        return json.loads(capsys.readouterr().out)["sha256"]

    needed = {}
    for tile in ("0", "128"):
        assert main([*RUN, "--vae_tile_px", tile, "--dry_run", "--json"]) == 0
        needed[tile] = json.loads(capsys.readouterr().out)["memory_bytes"]["decode"]["ram"]
    budget = f"{1.05 * (needed['0'] + needed['128']) / 2e9:.4f}"  # whole frames do not fit, tiles do
    assert main([*RUN, "--ram_gb", budget, "--dry_run"]) == 0
    assert "the VAE works in tiles of 128 pixels" in capsys.readouterr().out
    auto = made(*RUN, "--ram_gb", budget, "--save_file", "auto.png")
    asked = made(*RUN, "--vae_tile_px", "128", "--save_file", "asked.png")
    whole = made(*RUN, "--save_file", "whole.png")
    assert auto == asked != whole
    assert [read_settings(f"{name}.png")["vae_tile_px"] for name in ("auto", "asked", "whole")] == [128, 128, 0]
    assert made("--replay", "auto.png", "--device", "cpu", "--save_file", "again.png") == auto
