"""Whole videos: every way to share the work gives the latents and frames of one process, for each task that is here."""

from pathlib import Path

import pytest
import torch

from wan.distributed.parallel import Parallel
from tests.dist.processes import run
from wan.pipeline import WanPipeline
from wan.options import build_request
from wan.tasks import load_task
from wan.weights.write.export import export_gguf
from wan.weights.source import open_source

pytestmark = pytest.mark.dist

ASSETS = Path(__file__).resolve().parents[2] / "wan/assets"
SHORT = {"seed": 3, "frame_num": 9, "sample_steps": 3}
T2V, I2V = {"task": "t2v-tiny"} | SHORT, {"task": "i2v-tiny"} | SHORT
TEACACHE, FBCACHE = {"teacache": True, "teacache_thresh": 0.3}, {"fbcache": True, "fb_thresh": 0.15}
TEACACHE, FBCACHE = ({"sample_steps": 10} | cache for cache in (TEACACHE, FBCACHE))  # the fewest that a cache takes
FSDP = {"dit_fsdp": True, "t5_fsdp": True}
BLOCK = {"offload": "block", "resident_blocks": 1}
PHASED = {"task": "t2v-tiny", "seed": 3, "frame_num": 9, "sample_solver": "dmd", "sigmas": "1,0.757,0.522"}
PHASED |= {"phases": "steps=1,lora=0,guide=3|steps=2,guide=1", "lora": str(ASSETS / "tiny/loras/stripes.safetensors")}
ULYSSES, RING, CFG = {}, {"ring_size": 2}, {"cfg_parallel": True}
# What makes the video (compared with one process) -> how the work is shared. 3 heads, 48 and 45 tokens.
CASES = {
    2: [
        (T2V, [ULYSSES, ULYSSES | FSDP, RING, CFG | FSDP]),
        (T2V | FBCACHE, [ULYSSES | FSDP, CFG, CFG | FSDP]),
        (I2V | TEACACHE, [RING | FSDP, CFG]),
        (PHASED, [ULYSSES | FSDP, CFG]),
        (T2V | {"gguf": "model.gguf", "gguf_mode": "stream"}, [ULYSSES | FSDP, CFG | BLOCK]),
    ],
    4: [
        (T2V | {"size": "80*48"}, [ULYSSES, RING, CFG | RING | FSDP]),
        (T2V | TEACACHE, [ULYSSES | FSDP, CFG]),
        (I2V | FBCACHE, [ULYSSES | CFG | FSDP, RING, ULYSSES | {"offload": "phase"}]),
        (I2V, [RING | FSDP | {"offload_model": True}, ULYSSES]),
        (I2V | TEACACHE | {"gguf_high": "high.gguf", "gguf_low": "low.gguf", "gguf_mode": "stream"}, [ULYSSES | FSDP]),
    ],
}


def make(options, parallel, ranks, folder):
    files = {flag: f"{folder}/{name}" for flag, name in options.items() if flag.startswith("gguf") and "." in name}
    request = build_request(options | files | {"save_file": f"{folder}/unused.mp4", "device": "cpu"}, ranks)
    parallel = parallel and Parallel(*request.load.grid, local_size=2)  # of 4 ranks: two machines, each with a copy of the weights
    pipe = WanPipeline.from_request(request, load_task(request.load.task), parallel)
    result = pipe(request)
    cached = pipe.cache.telemetry.report() if request.sample.cache else {}
    skips = [branch["skipped"] for expert in cached.values() for branch in expert.values()]
    return {"latents": result.latents, "frames": torch.from_numpy(result.frames), "skips": skips}


def make_all(ranks, folder):
    return [[make(video | how, True, ranks, folder) for how in hows] for video, hows in CASES[ranks]]


@pytest.mark.parametrize("ranks", CASES)
def test_ranks_make_the_video_of_one_process(ranks, tmp_path):
    for task, folder, name in (("t2v", "tiny", "model"), ("i2v", "tiny_i2v", "high"), ("i2v", "tiny_i2v", "low")):
        part = f"{name}_noise_model" if task == "i2v" else "."
        source = open_source(ASSETS / folder / part / "diffusion_pytorch_model.safetensors")
        export_gguf(source, tmp_path / f"{name}.gguf", "Q8_0")
    wanted = [make(video, None, 1, tmp_path) for video, _ in CASES[ranks]]
    for rank, found in enumerate(run(ranks, make_all, tmp_path, ranks, tmp_path)):
        for (video, hows), mine, one in zip(CASES[ranks], found, wanted, strict=True):
            for how, many in zip(hows, mine, strict=True):
                where = (rank, video, how)
                assert many["skips"] == one["skips"] and all(one["skips"]), where
                # Sums in another order: of a ring, as of one process that takes the keys in parts, see ARCHITECTURE.md,
                # and of matrix products of fewer rows, on some processors (1.1e-5 on an EPYC, of latents up to 6).
                scale = one["latents"].abs().max()
                assert (many["latents"] - one["latents"]).abs().max() <= 1e-5 * scale, where
                assert (many["frames"].int() - one["frames"].int()).abs().max() <= 1, where
