"""What is counted of a network that runs on the meta device, beside what is known of it and what it does on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wan.models.ops import choose_ops
from wan.models.ops.sliced import counted_for
from wan.plan.tally import Tally


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture(params=[torch.inference_mode, torch.no_grad], autouse=True)
def mode(request):
    with request.param():
        yield


def test_bytes_are_those_that_live():
    before = empty(1000)
    with Tally() as tally:
        x = empty(1000)
        y = x[10:].view(-1)  # the same memory
        assert (tally.live, tally.peak) == (4000, 4000)
        z = (x + 1).mul_(2)
        del x
        assert (tally.live, tally.peak) == (8000, 8000)
        del y
        assert (tally.live, tally.peak) == (4000, 8000)
        other = before.view(10, 100).add_(1)
        assert tally.live == 4000 and other is not None
        del z
    assert tally.live == 0


def test_numbers_of_the_host_are_not_counted():
    with Tally() as tally:
        x = torch.ones(1000) + 1
    assert len(x) and tally.peak == 0


def test_work_is_that_of_the_flop_counter():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 5))
        filters = torch.empty(4, 3, 3, 3, 3)
    calls = [lambda: model(empty(7, 6)), lambda: F.conv3d(empty(2, 3, 4, 8, 8), filters, padding=1)]
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        with Tally() as tally:
            call()
        assert sum(tally.flops.values()) == counter.get_total_flops() > 0


def test_places_have_names():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    tally = Tally()
    with tally, tally.places({model[0]: "first"}):
        model(empty(7, 6))
    assert tally.flops == {("first", "matmul"): 2 * 7 * 6 * 8, ("rest", "matmul"): 2 * 7 * 8 * 5}
    with tally:
        model(empty(7, 6))
    assert tally.flops["rest", "matmul"] == 2 * 7 * 8 * 5 * 2 + 2 * 7 * 6 * 8


def test_scores_of_attention_are_not_written():
    if not torch.is_inference_mode_enabled():
        pytest.skip("it is taken apart before it is seen")
    q, k, v = empty(1, 2, 100, 8), empty(1, 2, 300, 8), empty(1, 2, 300, 8)
    with Tally() as tally:
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert tally.peak < 2 * q.nbytes and tally.flops["rest", "attention"] == 4 * 2 * 100 * 300 * 8


def test_convolutions_keep_the_order_of_their_input():
    """As those of a CPU do, so that nothing is copied."""
    with torch.device("meta"):
        filters = torch.empty(4, 4, 3, 3, 3)
    x = empty(1, 5, 6, 7, 4)
    with Tally() as tally:
        F.conv3d(x.permute(0, 4, 1, 2, 3), filters, padding=1).permute(0, 2, 3, 4, 1).contiguous()
    assert tally.peak == x.nbytes


@pytest.mark.parametrize("device, copies", [("cpu", 1), ("cuda", 2)])
def test_the_way_of_another_device(device, copies):
    """GELU is in place on a CPU, in slices that are small beside its input, and a new tensor on a GPU."""
    with Tally() as tally, counted_for(device):
        x = empty(1, 4096, 8192, dtype=torch.bfloat16)
        choose_ops(None, x.device).gelu(x)
    assert tally.peak == pytest.approx(copies * 2 * 4096 * 8192, rel=0.05)
