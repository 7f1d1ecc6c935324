"""A number that is none on one rank: all of them end after the same step, with an error of ours."""

import pytest

from wan.distributed.parallel import Parallel
from tests.dist.processes import run
from wan.finite import NotFinite
from wan.models.dit import WanModel
from wan.pipeline import WanPipeline
from wan.options import build_request
from wan.tasks import load_task

pytestmark = pytest.mark.dist


def spoil(patch):
    """From the second step on; each asks for two predictions."""
    real, calls = WanModel.forward, []

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs).clone()
        calls.append(1)
        if len(calls) > 2:
            out.view(-1)[-1] = float("nan")
        return out

    patch.setattr(WanModel, "forward", forward)


def on_two_ranks(folder):
    """The message of each rank, where the network of the second one alone makes a NaN."""
    quick = {"frame_num": 5, "sample_steps": 3, "size": "32*32", "seed": 1, "device": "cpu"}
    request = build_request(quick | {"save_file": f"{folder}/a.mp4"}, 2)
    parallel = Parallel(*request.load.grid, local_size=2)
    pipe = WanPipeline.from_request(request, load_task(request.load.task), parallel)
    with pytest.MonkeyPatch.context() as patch:
        if parallel.world.rank == 1:
            spoil(patch)
        try:
            pipe(request)
        except NotFinite as error:
            return str(error)


def test_all_ranks_end_together(tmp_path):
    first, second = run(2, on_two_ranks, tmp_path, tmp_path)
    assert "step 2 of 3: the latent of another rank" in first and "step 2 of 3: the latent is not finite" in second
