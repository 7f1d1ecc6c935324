"""What the checks of a stage see and what they do not mind."""

import pytest
import torch

from wan.finite import NotFinite, is_finite, largest
from wan.models.vae import WanVAE

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 7, 1000, 40_001])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_number_anywhere(dtype, count, value):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(x) and largest(x) == x.abs().max().item()
    for place in {0, count // 3, count - 1}:
        spoiled = x.clone()
        spoiled[place] = value
        assert not is_finite(spoiled) and not largest(spoiled) < 1e4


def test_the_largest_numbers_of_a_type_are_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert is_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))


@pytest.fixture(scope="module")
def vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanVAE(dim=8, z_dim=4, num_res_blocks=1).eval()


@torch.no_grad()
@pytest.mark.parametrize("tile_px", [0, 64])
@pytest.mark.parametrize("frame, told", [(0, "frame 1 "), (1, "frames 2 to 5 "), (2, "frames 6 to 9 ")])
def test_frames_that_a_decoder_spoils(vae, tile_px, frame, told):
    """In one corner: with tiles, in the last of them."""
    z = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    z[0, 0, frame, -1, -1] = 1e38  # squares overflow in it
    z[0, 1, frame, -1, -1] = -INF
    with pytest.raises(NotFinite, match=told):
        vae.decode(z, tile_px=tile_px)
