"""A script of LightX2V's users, started as by torchrun."""

from pathlib import Path

import pytest
import torch

from tests.dist.processes import Program, environments
from wan.compat.lightx2v import LightX2VPipeline
from wan.media import read_settings

pytestmark = pytest.mark.dist
LIMIT_S = 300
REPO = Path(__file__).resolve().parents[2]
MODEL = {"model_path": str(REPO / "wan/assets/tiny"), "model_cls": "wan2.1", "task": "t2v"}
FEW = {"attn_mode": "torch_sdpa", "infer_steps": 2, "num_frames": 5, "height": 64, "width": 64, "guidance_scale": 1}
VIDEO = {"seed": 3, "prompt": "a red circle moving right on a black background"}
SCRIPT = f"""
import os

import torch
from wan.compat.lightx2v import LightX2VPipeline

pipe = LightX2VPipeline(**{MODEL!r})
pipe.enable_parallel(seq_p_size=2, seq_p_attn_type="ring")
pipe.create_generator(**{FEW!r})
pipe.generate(**{VIDEO!r}, save_result_path="a.mp4")
video = pipe.generate(**{VIDEO!r}, return_result_tensor=True)["video"]
torch.save(video, f"{{os.environ['RANK']}} {{pipe.engine.load.grid}}.pt")
pipe.generate(**{VIDEO!r}, save_result_path="a.avi")
"""


def test_two_processes_make_the_video_of_one(tmp_path):
    """By keys that go round; one file and no more; and what fails ends both, in one line."""
    (tmp_path / "script.py").write_text(SCRIPT)
    ranks = [Program(["script.py"], tmp_path, env) for env in environments(2)]
    for rank in ranks:
        rank.wait(LIMIT_S)
    said = (tmp_path / "stderr").read_text()
    assert all(rank.returncode for rank in ranks) and ": save_result_path must end in .mp4" in said, said
    assert read_settings(tmp_path / "a.mp4")["seed"] == 3
    of_ranks = [torch.load(tmp_path / f"{rank} Grid(cfg=1, ring=2, ulysses=1).pt", weights_only=True) for rank in (0, 1)]
    pipe = LightX2VPipeline(**MODEL)
    pipe.create_generator(**FEW)
    alone = pipe.generate(**VIDEO, return_result_tensor=True)["video"]
    assert all((one - alone).abs().max() <= 2 / 255 for one in of_ranks)
