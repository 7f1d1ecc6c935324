"""What a 14B network may take on a GPU at 480p, counted on the meta device: launches, bytes that pass through memory
beside products and attention, copies from the host, peak.

That it runs there at all shows that nothing waits for the device: what has no values cannot be read.
"""

from functools import cache

import pytest
import torch
from wan.distributed.grid import Grid

from wan.models.dit import rope
from wan.models.dit.sequence import Schedule
from wan.models.ops import triton
from wan.models.ops.sliced import counted_for
from wan.plan import runs
from wan.plan.tally import Tally
from wan.tasks import load_task

LATENT = (16, 21, 60, 104)  # 81 frames of 832 x 480
TOKENS, FRAME = 32_760, 1560
GB = 10**9
ONE_TIME = torch.tensor([500.0])
TWO_TIMES = torch.tensor([[0.0] * FRAME + [500.0] * (TOKENS - FRAME)])  # a clean first frame


@cache
def steps_of(task, ops="triton", has_two_times=False):
    """Tallies of two steps of a run, of a network of two blocks."""
    model, t = runs._few_blocks(dict(load_task(task).dit), "bf16"), TWO_TIMES if has_two_times else ONE_TIME
    model.ops, tallies = ops, []
    rope._table.cache_clear()
    triton._row_of_each.cache_clear()
    with torch.inference_mode(), counted_for("cuda"):
        for times in Schedule([t, t + 1]):
            tallies.append(Tally())
            with tallies[-1] as tally, tally.places({block: "block" for block in model.blocks}):
                runs._predict(model, runs._empty(1, *LATENT), times)
    return tallies


@pytest.mark.parametrize("has_two_times", [False, True])
@pytest.mark.parametrize(
    "task, launches, gigabytes",
    [
        ("t2v-14B", 21, 7.0),
        ("i2v-14B", 26, 7.5),  # what is seen of the text and of the image is added: 1 GB
    ],
)
def test_a_block(task, launches, gigabytes, has_two_times):
    _, tally = steps_of(task, has_two_times=has_two_times)
    assert tally.launches["block"] == 2 * launches <= 2 * 30
    assert tally.passes["block"] <= 2 * gigabytes * GB


@pytest.mark.parametrize("task", ["t2v-14B", "i2v-14B", "vace-14B", "s2v-14B"])
def test_what_all_steps_share_is_copied_by_the_first(task):
    first, second = steps_of(task)
    assert 0 < first.uploads <= 4 and second.uploads == 0  # times, rotations, which token has which time
    assert steps_of("t2v-14B", has_two_times=True)[1].uploads == 0


def test_what_is_outside_of_blocks():
    tally = steps_of("t2v-14B")[1]
    assert tally.launches["rest"] <= 15 and tally.passes["rest"] <= 1.5 * GB


@pytest.mark.parametrize("task", ["t2v-14B", "i2v-14B"])
def test_the_plan_has_room_for_it(task):
    """It is made for slices, which run where there is no Triton, and take more."""
    planned = runs.denoising_bytes(load_task(task), LATENT, "bf16", "cuda", Grid(), "unipc", True, False)
    fused, sliced = (steps_of(task, ops)[1].peak for ops in ("triton", "gpu"))
    assert fused <= 0.9 * sliced and sliced <= planned


def test_products_do_the_same_work():
    fused, sliced = (steps_of("t2v-14B", ops)[1].flops for ops in ("triton", "gpu"))
    assert fused == sliced
