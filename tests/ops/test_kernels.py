"""The kernels of a GPU, interpreted, beside the formulas that define them."""

import pytest
import torch

from wan import kernels
from wan.models import ops as ops_module
from wan.models import vae_blocks
from wan.models.dit import WanModel
from wan.models.ops import OPS, choose_ops
from wan.models.ops.compare import compared, is_close
from wan.models.ops.reference import Modulated, Reference
from wan.models.vae import WanVAE

CPU = torch.device("cpu")
KERNELS = choose_ops("triton", CPU)


@pytest.mark.parametrize(
    "dtype, width",  # many tokens a program, and one; no width is a power of two
    [(torch.float32, 96), (torch.bfloat16, 96), (torch.float16, 40), (torch.bfloat16, 4096 + 8)],
)
def test_they_compute_what_the_reference_does(dtype, width, device):
    tokens, batch = (37, 2) if width < 1000 else (3, 1)
    for name, made, wanted in compared(KERNELS, dtype, device, width, tokens, batch):
        assert made.dtype == wanted.dtype and is_close(made, wanted), name
        if dtype != torch.float32 and name != "linear_gelu":  # but for ties that sums in another order decide otherwise
            assert (made == wanted).float().mean() > 0.995, name


def test_modulation_is_not_rounded(device):
    """A scale of 0.003 would vanish in bf16, beside 1."""
    x, rows = torch.randn(1, 20, 96, device=device).bfloat16(), torch.full((1, 96), 0.003, device=device)
    made = KERNELS.norm(x, Modulated(torch.zeros_like(rows), rows, 1e-6), [(0, 20)])
    exact = torch.nn.functional.layer_norm(x.double(), (96,), eps=1e-6) * 1.003
    assert (made == exact.bfloat16()).float().mean() > 0.995


def test_no_tokens_are_no_launch():
    ops, x, gate = KERNELS, torch.empty(2, 0, 96), torch.zeros(1, 96)
    norm = Modulated(gate, gate, 1e-6)
    for made in (ops.norm(x, norm, []), *ops.gated_add_norm(x, x, gate, norm, []), ops.gated_add(x, x, gate, [])):
        assert made.shape == x.shape
    assert ops.norm_rope(x, gate[0], 1e-6, 24, None).shape == (2, 0, 4, 24)


def test_a_window_is_written_where_it_lies_alone(device):
    """Rows of a picture that processes share lie among their neighbours'."""
    x, gamma = torch.randn(1, 2, 4, 5, 24, device=device), torch.randn(24, device=device)
    wide = torch.full((1, 5, 6, 5, 24), 7.0, device=device)
    KERNELS.rms_norm(x, gamma, wide[:, 3:, 1:5], silu=True)
    assert is_close(wide[:, 3:, 1:5], Reference().rms_norm(x, gamma, silu=True))
    assert (wide[:, :3] == 7).all() and (wide[:, :, 0] == 7).all() and (wide[:, :, 5] == 7).all()
    with pytest.raises(ValueError, match="do not lie together"):
        KERNELS.rms_norm(x, gamma, wide.new_empty(1, 2, 4, 7, 24)[:, :, :, :5])


def test_a_network_of_kernels_is_that_of_formulas(network):
    """All of a forward: several times in a step, a batch of two, images, bf16."""
    made, wanted = (network(ops) for ops in ("triton", "reference"))
    assert (made - wanted).abs().max() < 0.03 * wanted.abs().max()
    assert (network("gpu") - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.fixture
def network(device):
    torch.manual_seed(0)
    shape = {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 2, "text_dim": 16, "freq_dim": 32, "text_len": 8}
    model = WanModel(model_type="i2v", in_dim=8, out_dim=4, **shape).to(device, torch.bfloat16)
    for name, one in model.named_parameters():
        one.data = torch.randn_like(one.float()).mul_(0.2).to(torch.float32 if model.keep_fp32(name) else one.dtype)
    x, y, text, clip = (
        torch.randn(*size).to(device) for size in ((2, 4, 2, 4, 6), (2, 4, 2, 4, 6), (2, 5, 16), (2, 257, 1280))
    )
    times = torch.tensor([[0.0] * 6 + [500.0] * 6]).expand(2, -1)

    def run(ops):
        model.ops = ops
        with torch.inference_mode():
            return model(x, times, text, y=y, clip_fea=clip)

    return run


def test_a_vae_of_kernels_is_that_of_formulas(monkeypatch, device):
    """Both ways, in several chunks, each written behind the frames that it looks back at."""
    torch.manual_seed(0)
    vae = WanVAE(dim=8, z_dim=4, dim_mult=(1, 1, 2), num_res_blocks=1, temporal_downsample=(True, True)).to(device)
    video = torch.randn(1, 3, 9, 8, 12, device=device)
    wanted = vae.encode(video)
    pixels = vae.decode(wanted)
    monkeypatch.setattr(vae_blocks, "choose_ops", lambda name, device: KERNELS)
    assert torch.allclose(vae.encode(video), wanted, atol=1e-4)
    assert torch.allclose(vae.decode(wanted), pixels, atol=1e-4)


# Where they are used


class Wrong(Reference):
    def gelu(self, x):
        return super().gelu(x) * 1.1


def failing():
    raise RuntimeError("no driver\nat all")


def test_a_gpu_takes_them_where_the_first_call_is_right(monkeypatch):
    monkeypatch.setattr(kernels, "are_there", lambda device: True)
    monkeypatch.setattr(ops_module, "_triton", lambda: Reference())
    taken = ops_module._for_gpu.__wrapped__
    assert type(taken(CPU)) is Reference
    for broken, reason in ((Wrong, "its numbers are wrong"), (failing, "no driver at all")):
        monkeypatch.setattr(ops_module, "_triton", broken)
        with pytest.warns(UserWarning, match=f"no fused kernels: {reason}; torch's formulas are used, slower"):
            assert taken(CPU) is OPS["gpu"]


def test_they_are_for_cuda_with_triton_alone(monkeypatch):
    cuda, where = torch.device("cuda"), "importlib.util.find_spec"
    assert kernels.are_there(cuda) and not kernels.are_there(CPU) and not kernels.are_there(torch.device("mps"))
    monkeypatch.setenv("SWAN_TRITON", "0")
    assert not kernels.are_there(cuda)
    monkeypatch.delenv("SWAN_TRITON")
    monkeypatch.setattr(where, lambda name: None)
    assert not kernels.are_there(cuda)
