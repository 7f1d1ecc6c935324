"""Elementwise chains: in fp32 and rounded once, whatever the type of the hidden states and the device."""

import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode

from wan.models import layers
from wan.models.ops import OPS, choose_ops
from wan.models.ops.reference import Modulated

EPS = 1e-6
C, TOKENS = 64, 5000  # several slices of a CPU
SEGMENTS = [(0, 1000), (1, 3500), (0, 500)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def hidden(dtype, seed=0):
    return torch.randn(1, TOKENS, C, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(seed):
    """Modulation as it is in a network: most of it far below what bf16 holds beside 1."""
    return torch.randn(2, C, generator=torch.Generator().manual_seed(seed)) * 0.003


def by_token(rows_RC):
    return torch.cat([rows_RC[row].expand(count, -1) for row, count in SEGMENTS])[None]


def exact_norm(x, shift, scale):
    return torch.nn.functional.layer_norm(x.double(), (C,), eps=EPS) * (1 + by_token(scale).double()) + by_token(shift)


def rounded_once(made, exact):
    """As close as the type of `made` allows, but for ties that fp32 decides otherwise."""
    assert (made == exact.to(made.dtype)).float().mean() > 0.999
    torch.testing.assert_close(made.double(), exact, rtol=torch.finfo(made.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modulation_is_not_rounded(dtype, ops):
    x, y, shift, scale = hidden(dtype), hidden(dtype, 1), rows(2), rows(3)
    made = ops.norm(x, Modulated(shift, scale, EPS), SEGMENTS)
    if dtype == torch.float32:
        torch.testing.assert_close(made.double(), exact_norm(x, shift, scale), rtol=1e-5, atol=1e-5)
    else:
        rounded_once(made, exact_norm(x, shift, scale))
        rounded_once(ops.gated_add(x, y, scale, SEGMENTS), x.double() + by_token(scale).double() * y.double())
    assert made.dtype == dtype and made.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_scale_counts_where_no_kernel_takes_both_types(dtype):
    """What a GPU computes, on a CPU: a scale of 0.003 would vanish in bf16, beside 1."""
    x, shift = hidden(dtype)[0], torch.zeros(C)
    made = OPS["gpu"]._norm(x, torch.full((C,), 1.003), shift, EPS)
    exact = torch.nn.functional.layer_norm(x.double(), (C,), eps=EPS) * 1.003
    rounded_once(made, exact)
    assert not torch.equal(made, OPS["gpu"]._norm(x, torch.ones(C), shift, EPS))


class LayerNorms(TorchFunctionMode):
    """Types and numbers of rows that layer_norm is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.layer_norm:
            self.seen.append((args[0].dtype, kwargs["weight"].dtype, len(args[0])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_the_cpu_slices_are_normed_in_fp32(dtype):
    """The meta device stands for one that is not there: no kernel takes two types, and no copy is of all tokens."""
    tokens, width = 40_000, 1024
    ops = choose_ops(None, torch.device("meta"))
    x = torch.empty(1, tokens, width, dtype=dtype, device="meta")
    shift = scale = torch.empty(1, width, device="meta")
    with LayerNorms() as norms:
        made = ops.norm(x, Modulated(shift, scale, EPS), [(0, tokens)])
    assert made.shape == x.shape and made.dtype == dtype
    assert {kinds[:2] for kinds in norms.seen} == {(torch.float32, torch.float32)}
    counts = [count for _, _, count in norms.seen]
    assert sum(counts) == tokens and (dtype == torch.float32 or max(counts) * width * 4 <= 32 << 20)
    assert ops.gated_add(x, x, scale, [(0, tokens)]).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_slices_compute_what_the_reference_does(name, dtype):
    x, weight = hidden(dtype), torch.randn(C, generator=torch.Generator().manual_seed(5))
    angle = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(6))
    rope = torch.polar(torch.ones_like(angle), angle)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    for call in (
        lambda ops: ops.norm_rope(x.clone(), weight, EPS, 16, rope),
        lambda ops: ops.norm_rope(x.clone(), weight, EPS, 16, None),
        lambda ops: ops.gelu(x.clone()),
    ):
        made, wanted = call(OPS[name]), call(OPS["reference"])
        assert made.shape == wanted.shape and made.dtype == dtype
        torch.testing.assert_close(made, wanted, **tolerance)


def test_a_gradient_is_asked_of_the_reference_alone():
    with torch.enable_grad():
        assert choose_ops(None, torch.device("cpu")) is OPS["reference"]
    assert choose_ops(None, torch.device("cpu")) is OPS["cpu"] and choose_ops("cpu", torch.device("meta")) is OPS["cpu"]


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_ops_are_their_parts(dtype, ops):
    x, y, gate = hidden(dtype), hidden(dtype, 1), rows(2)
    modulated, affine = Modulated(rows(3), rows(4), EPS), torch.nn.LayerNorm(C, EPS, dtype=dtype)
    for gate_RC, norm in itertools.product((gate, None), (modulated, affine)):
        added, normed = ops.gated_add_norm(x, y, gate_RC, norm, SEGMENTS)
        wanted = x + y if gate_RC is None else ops.gated_add(x, y, gate_RC, SEGMENTS)
        assert torch.equal(added, wanted) and torch.equal(normed, ops.norm(wanted, norm, SEGMENTS))
    linear = torch.nn.Linear(C, 2 * C, dtype=dtype)
    assert torch.equal(ops.linear_gelu(linear, x), ops.gelu(linear(x)))
    out = torch.empty_like(x).view(1, 1, 50, 100, C)
    made = ops.rms_norm(x.view_as(out), affine.weight, out, silu=True)
    exact = torch.nn.functional.rms_norm(x.double(), (C,), eps=0)
    assert made is out
    torch.testing.assert_close(
        made.view_as(x).double(), exact * exact.sigmoid(), rtol=3 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("name, shape", [("Linear", (3, 4)), ("Conv2d", (3, 4, 3)), ("Conv3d", (3, 4, 3))])
def test_layers_draw_their_first_values_as_those_of_torch(name, shape):
    made = []
    for kind in (getattr(layers, name), getattr(torch.nn, name)):
        torch.manual_seed(0)
        made.append(kind(*shape).state_dict())
    assert all(torch.equal(made[0][key], made[1][key]) for key in ("weight", "bias"))
    with torch.device("meta"):
        assert getattr(layers, name)(*shape).weight.is_meta
