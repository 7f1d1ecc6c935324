"""Attention by our own kernel for CPUs with AVX512-BF16, where this one has that and a compiler."""

import pytest
import torch

from wan.models import attention_native as native
from wan.models.attention import get_attention

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def kernel():
    if native._library() is None:
        pytest.skip("this CPU has no AVX512-BF16, or AMX, or there is no compiler")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def exact(q, k, v):
    """(attention, log of the sum), in fp64."""
    scores = torch.einsum("blhd,bmhd->blhm", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("blhm,bmhd->blhd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


@pytest.mark.parametrize(
    "batch, queries, keys, heads, width",
    [(1, 1, 1, 1, 128), (2, 49, 257, 3, 128), (1, 96, 512, 2, 64), (1, 130, 63, 1, 256), (1, 7, 1000, 2, 192)],
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_it_is_as_exact_as_torch(batch, queries, keys, heads, width, scale):
    q, k, v = (random(batch, count, heads, width, seed=seed) for seed, count in enumerate((queries, keys, keys)))
    q = q * scale  # the softmax is sharper
    wanted, lse = exact(q, k, v)
    made = native.attend(q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)))
    errors = [float((one.double() - wanted).norm() / wanted.norm()) for one in (made.out, theirs.transpose(1, 2))]
    assert errors[0] < 1.1 * errors[1] + 1e-4
    assert (made.lse - lse).abs().max() < 1e-4


def test_tensors_that_lie_in_others():
    """As heads of a projection of all three, and of some rows."""
    whole = random(2, 60, 3, 4, 128)
    q, k, v = whole.unbind(2)
    wanted = native.attend(*(one.contiguous() for one in (q, k, v)))
    assert all(torch.equal(*pair) for pair in zip(native.attend(q, k, v), wanted))
    part = native.attend(q[:, 10:30], k, v)
    assert torch.equal(part.out, wanted.out[:, 10:30])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_no_number_stays_none(part):
    given = [random(1, 70, 2, 64, seed=seed) for seed in range(3)]
    given[part][0, 5, 1, 7] = float("nan")
    out = native.attend(*given).out
    assert out[0, 5, 1].isnan().any() and not out[0, :, 0].isnan().any()


def test_who_takes_it():
    q = random(1, 40, 2, 128)
    sdpa, made = get_attention("sdpa"), native.attend(q, q, q)
    assert torch.equal(sdpa(q, q, q), made.out) and torch.equal(sdpa.with_lse(q, q, q)[1], made.lse)
    assert native.attend(q.float(), q.float(), q.float()) is None
    assert native.attend(q.half(), q.half(), q.half()) is None
    assert native.attend(*[random(1, 40, 2, 24)] * 3) is None
    assert native.attend(*[q.to("meta")] * 3) is None
    assert native.attend(*[q.clone().requires_grad_()] * 3) is None
    assert native.attend(*[q.transpose(-1, -2)[..., :128]] * 3) is None


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16", "amx_bf16"}])
def test_other_cpus_keep_torch(monkeypatch, flags):
    monkeypatch.setattr(native, "cpu_flags", lambda: flags)
    assert native._library.__wrapped__() is None


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, tmp_path):
    wrong = tmp_path / "attention.c"
    wrong.write_text(native.SOURCE.read_text().replace("s->scale * 1.4", "s->scale * 1.6"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCE", wrong)
    with pytest.warns(UserWarning, match="no compiled attention: attention.c gives wrong numbers .* torch's, slower"):
        assert native._library.__wrapped__() is None
