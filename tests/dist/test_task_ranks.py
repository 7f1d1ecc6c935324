"""Every task of the core on ranks that share tokens, branches and weights: the latents of one process."""

import pytest
import torch

from wan.audio import RATE
from wan.distributed.parallel import Parallel
from tests.dist.processes import run
from tests.unit.animate_helpers import small_spec, write_inputs
from tests.unit.sound_helpers import tone, write_sound
from tests.unit.test_pipeline import CASES, picture
from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.pipeline import WanPipeline
from wan.options import build_request

pytestmark = pytest.mark.dist

RANKS = 4
FSDP = {"dit_fsdp": True, "t5_fsdp": True}
# 2 heads, 24 tokens (ti2v: 6): fewer heads than ranks, and lengths that these do not divide.
WAYS = [FSDP, {"cfg_parallel": True, "ring_size": 2, "offload_model": True}]


def make(options, spec, ranks, parallel=None):
    request = build_request(options, ranks)
    if ranks > 1:
        parallel = Parallel(*request.load.grid, local_size=ranks)
    return WanPipeline.from_request(request, spec, parallel)(request).latents


def make_all(cases):
    return {name: [make(options | way, spec, RANKS) for way in WAYS] for name, (options, spec) in cases.items()}


@pytest.fixture
def cases(tmp_path):
    """Name -> (options, spec)."""
    found = {}
    for name, (task, images) in CASES.items():
        spec, folder = shrunk(task), tmp_path / task
        if not folder.exists():
            folder.mkdir()
            write_checkpoint(folder, spec)
        options = {flag: picture(tmp_path / f"{flag}.png", index) for index, flag in enumerate(images)}
        options |= {"task": task, "ckpt_dir": str(folder), "prompt": "a red cat", "size": "64x32", "frame_num": 9}
        options |= {"sample_steps": 4, "seed": 1, "device": "cpu", "dtype": "fp32"}
        options |= {"save_file": str(tmp_path / "a.mp4")}
        found[name] = options, spec
    spec, folder = shrunk("s2v-14B"), tmp_path / "s2v-14B"
    folder.mkdir()
    write_checkpoint(folder, spec)
    speech = write_sound(folder / "speech.wav", tone(RATE, 0.8), RATE)
    spoken = {"infer_frames": 8, "frame_num": None, "audio": speech, "image": picture(tmp_path / "face.png", 0)}
    found["s2v"] = options | {"task": "s2v-14B", "ckpt_dir": str(folder), "size": "64x64"} | spoken, spec
    found["s2v"][0].pop("last_frame", None)
    return found


def test_every_task(cases, tmp_path):
    wanted = {name: make(*case, 1) for name, case in cases.items()}
    for found in run(RANKS, make_all, tmp_path, cases):
        for name, one in wanted.items():
            for way, many in zip(WAYS, found[name], strict=True):
                assert (many - one).abs().max() <= 1e-5 * one.abs().max(), (name, way)


def make_film(options, spec, ranks):
    return make(options | {"frame_num": 9}, spec, ranks)


def make_films(options, spec):
    return [make_film(options | way, spec, RANKS) for way in WAYS]


def test_a_film_whose_tokens_look_at_a_face(tmp_path):
    """Two clips: the second goes on with what the first one's ranks have decoded."""
    spec, folder = small_spec(), tmp_path / "animate"
    folder.mkdir()
    write_checkpoint(folder, spec)
    source = write_inputs(tmp_path / "source", frames=10, face=32)
    options = {"task": "animate-14B", "ckpt_dir": str(folder), "src_root_path": str(source), "replace_flag": True}
    options |= {"sample_steps": 2, "sample_guide_scale": 2.0, "seed": 1, "device": "cpu", "dtype": "fp32"}
    options |= {"save_file": str(tmp_path / "a.mp4")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = make_film(options, spec, 1)
    torch.set_num_threads(threads)
    for found in run(RANKS, make_films, tmp_path, options, spec):
        for way, many in zip(WAYS, found, strict=True):
            assert (many - wanted).abs().max() <= 1e-5 * wanted.abs().max(), way
