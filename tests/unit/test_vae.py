"""The VAE: equal to diffusers', and streaming, tiling and batching change nothing."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan.models import vae_blocks
from wan.models.vae import WanVAE
from wan.models.vae_base import LATENT_STATS, _tiled
from wan.models.vae_blocks import AttentionBlock, ResidualBlock
from wan.weights.assign import load_weights

CONFIGS = {
    "2.1": {"version": "2.1", "dim": 8, "z_dim": 16},
    "2.2": {"version": "2.2", "dim": 8, "dec_dim": 12, "z_dim": 48},
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(params=CONFIGS)
def vae(request):
    torch.manual_seed(0)
    return WanVAE(**CONFIGS[request.param]).eval()


def video(frames=5, rows=32, columns=48, batch=1):
    torch.manual_seed(1)
    return torch.rand(batch, 3, frames, rows, columns) * 2 - 1


def smooth(*shape):
    """A field that varies slowly over rows and columns, as a picture does."""
    rows, columns = (torch.linspace(0, 3, size) for size in shape[-2:])
    field = torch.sin(rows)[:, None] + torch.cos(1.7 * columns)
    phase = torch.arange(shape[1]).view(-1, 1, 1, 1) / shape[1]
    return (field * torch.cos(2 * phase) + phase).expand(shape).clone() / 2


def latent(vae, frames=2, rows=4, columns=6, batch=1):
    torch.manual_seed(2)
    return torch.randn(batch, vae.z_dim, frames, rows, columns)


def close(actual, wanted, tolerance=1e-5):
    assert actual.shape == wanted.shape and actual.dtype == torch.float32
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("frames", [1, 3])
def test_equals_diffusers(version, frames):
    pytest.importorskip("diffusers")
    from benchmarks.peers import build_ours, build_theirs
    from tests.unit.weight_helpers import DictSource

    config = CONFIGS[version]
    torch.manual_seed(0)
    theirs = build_theirs("vae", config)
    ours = load_weights(build_ours("vae", config), DictSource(theirs.state_dict()), "vae")
    z, pixels = latent(ours, frames), video(4 * frames - 3, batch=2)
    close(ours.decode_raw(z).clamp(-1, 1), theirs.decode(z).sample, 1e-4)
    close(ours.encode_raw(pixels), theirs.encode(pixels).latent_dist.mode(), 1e-4)


def test_shapes_and_normalisation(vae):
    z = vae.encode(video(9))
    stride = vae.stride_s
    assert z.shape == (1, vae.z_dim, 3, 32 // stride, 48 // stride)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in LATENT_STATS[vae.z_dim])
    close(z, (vae.encode_raw(video(9)) - mean) / std)
    decoded = vae.decode(z)
    assert decoded.shape == (1, 3, 9, 32, 48) and decoded.abs().max() <= 1
    close(decoded, vae.decode_raw(z * std + mean).clamp(-1, 1))


def test_statistics_can_be_given():
    torch.manual_seed(0)
    plain = WanVAE("2.1", dim=4, z_dim=2, latent_mean=[0.0] * 2, latent_std=[1.0] * 2)
    assert torch.equal(plain.encode(video(1)), plain.encode_raw(video(1)))


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_frames_beyond_4n_plus_1_are_dropped(vae, extra):
    pixels = video(5 + extra)
    assert torch.equal(vae.encode(pixels), vae.encode(pixels[:, :, :5]))


def test_a_batch_equals_its_elements(vae):
    pixels, z = video(5, batch=2), latent(vae, batch=2)
    encoded, decoded = vae.encode_raw(pixels), vae.decode_raw(z)
    for i in range(2):
        close(encoded[i : i + 1], vae.encode_raw(pixels[i : i + 1]))
        close(decoded[i : i + 1], vae.decode_raw(z[i : i + 1]))


def test_later_frames_do_not_change_earlier_ones(vae):
    pixels, z = video(9), latent(vae, 3)
    close(vae.encode_raw(pixels)[:, :, :2], vae.encode_raw(pixels[:, :, :5]))
    close(vae.decode_raw(z)[:, :, :5], vae.decode_raw(z[:, :, :2]))


def test_the_input_is_left_alone_and_a_run_leaves_no_trace(vae):
    pixels, z = video(5), latent(vae)
    kept = pixels.clone(), z.clone()
    first = vae.encode(pixels), vae.decode(z)
    assert torch.equal(pixels, kept[0]) and torch.equal(z, kept[1])
    assert torch.equal(vae.encode(pixels), first[0]) and torch.equal(vae.decode(z), first[1])


def test_bf16_stays_close_to_fp32(vae):
    pixels, z = video(5), latent(vae)
    encoded, decoded = vae.encode_raw(pixels), vae.decode_raw(z)
    vae.bfloat16()
    for actual, wanted in ((vae.encode_raw(pixels), encoded), (vae.decode_raw(z), decoded)):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() < 0.05 * wanted.norm()


def test_a_tile_that_covers_all_changes_nothing(vae):
    pixels, z = video(), latent(vae, 2, 3, 3)
    assert torch.equal(vae.encode(pixels, tile_px=48), vae.encode(pixels))
    assert torch.equal(vae.decode(z, tile_px=3 * vae.stride_s), vae.decode(z))


def local(vae):
    """Weakens what looks far, as training does; untrained, a border is felt across the whole tile."""
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.residual["6"].weight.mul_(0.05)
        if isinstance(module, AttentionBlock):
            module.proj.weight.mul_(0.05)
    return vae


def test_tiled_decode_is_close_and_has_no_seams(vae):
    z = smooth(1, vae.z_dim, 2, 12, 16)
    whole, tiled = local(vae).decode(z), vae.decode(z, tile_px=8 * vae.stride_s)
    assert (tiled - whole).norm() < 0.05 * whole.norm()
    for axis in (-1, -2):
        assert (tiled - whole).diff(dim=axis).abs().max() < 0.5 * whole.diff(dim=axis).abs().max()


def test_tiled_encode_is_close(vae):
    pixels = smooth(1, 3, 5, 8 * vae.stride_s, 14 * vae.stride_s)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in LATENT_STATS[vae.z_dim])
    whole, tiled = local(vae).encode_raw(pixels), vae.encode(pixels, tile_px=8 * vae.stride_s) * std + mean
    assert (tiled - whole).norm() < 0.1 * whole.norm()


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (5, 20)])
@pytest.mark.parametrize("tile, align", [(4, 1), (6, 2), (8, 8), (5, 4)])
def test_tiling_a_local_operation_changes_nothing(size, tile, align):
    x = torch.rand(1, 2, 3, *(side * align for side in size))
    tile *= align
    close(_tiled(lambda part: part * 2 + 1, x, tile, 1, align), x * 2 + 1)
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    close(_tiled(lambda part: part.repeat_interleave(2, -1).repeat_interleave(2, -2), x, tile, 2, align), doubled)


def test_tiles_blend_without_a_jump():
    """Two tiles that disagree by 1 are joined by a ramp over their overlap."""
    values = iter((0.0, 1.0))
    out = _tiled(lambda part: torch.full_like(part, next(values)), torch.zeros(1, 1, 1, 8, 14), 8, 1, 1)
    steps = out[0, 0, 0, 0].diff()
    assert (steps >= 0).all() and steps.max() <= 0.5 and out.min() == 0 and out.max() == 1


@pytest.mark.parametrize("rows, columns, tile", [(7, 9, 4), (4, 13, 5), (5, 5, 4), (8, 8, 2)])
def test_tiles_of_any_size_cover_everything(vae, rows, columns, tile):
    stride = vae.stride_s
    z = latent(vae, 1, rows, columns)
    decoded = vae.decode(z, tile_px=tile * stride)
    assert decoded.shape == (1, 3, 1, rows * stride, columns * stride) and decoded.isfinite().all()
    assert vae.encode(decoded, tile_px=tile * stride).isfinite().all()


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside it hold at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_large_frames_by_twos_change_nothing(vae, monkeypatch):
    seen, whole = [], vae.encode(video(frames=9))
    monkeypatch.setattr(vae_blocks, "_LARGE_FRAME_BYTES", 1)
    vae.encoder.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    assert torch.equal(vae.encode(video(frames=9)), whole) and seen == [1, 2, 2, 2, 2]


def test_memory_beside_the_video_does_not_grow_with_its_length(vae):
    """Beside the result, the input and a copy of it in the network's layout, coding holds one chunk."""
    beside = {"decode": [], "encode": []}
    for frames in (4, 10):
        z, pixels = latent(vae, frames), video(4 * frames - 3, 64, 64)
        for name, run, given in (("decode", vae.decode_raw, z), ("encode", vae.encode_raw, pixels)):
            with LiveBytes() as seen:
                out = run(given)
            beside[name].append(seen.peak - out.nbytes - 2 * given.nbytes)
    for short, long in beside.values():
        assert 0 < long <= 1.05 * short
