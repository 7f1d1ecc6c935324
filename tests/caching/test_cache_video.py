"""A cache in the whole pipeline."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from wan.cache.coefficients import load_coefficients
from wan.cache.policies.magcache import nearest

from tests.caching.network import official_mask
from tests.caching.toy import decisions
from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.options import build_request
from wan.pipeline import WanPipeline


def test_image_to_video_with_two_experts(tmp_path):
    """Published tables of both experts; the same latents with threshold 0 as without a cache."""
    picture = tmp_path / "first.png"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    spec = shrunk("i2v-A14B")
    write_checkpoint(tmp_path, spec)
    latents, pipe = {}, None
    for threshold in (None, 0, 0.2):
        flags = {} if threshold is None else {"magcache": True, "mag_thresh": threshold}
        request = build_request(
            {"task": "i2v-A14B", "ckpt_dir": str(tmp_path), "prompt": "a cat", "image": str(picture), "seed": 1}
            | {"size": "64x32", "frame_num": 5, "sample_steps": 20, "device": "cpu", "dtype": "fp32", **flags}
            | {"save_file": str(tmp_path / "a.mp4")}
        )
        pipe = WanPipeline.from_request(request, spec)
        latents[threshold] = pipe(request).latents
    assert torch.equal(latents[0], latents[None]) and not torch.equal(latents[0.2], latents[None])
    report = pipe.cache.telemetry.report()
    assert list(report) == ["high", "low"] and pipe.cache.kept_bytes() == 0
    ratios = load_coefficients("wan2.2-i2v-A14B")["magcache"]["ratios"]
    for expert, branches in report.items():
        mask = official_mask(nearest(ratios[expert], branches["cond"]["total"]), 0.2, 4, 0.2)
        for branch in ("cond", "uncond"):
            assert decisions(pipe.cache, branch, expert) == "".join("cS"[skip] for skip in mask)
            assert branches[branch]["skipped"] > 2
