"""Every way to share the tokens and the branches gives what one process gives."""

from functools import partial

import pytest
import torch

from wan.distributed.grid import split
from wan.distributed.parallel import Parallel
from wan.distributed.ring import merge
from tests.dist.processes import run
from wan.models.attention import get_attention
from wan.models.dit import WanModel

pytestmark = pytest.mark.dist

SHAPE = {
    "in_dim": 4,
    "out_dim": 4,
    "dim": 60,
    "ffn_dim": 80,
    "freq_dim": 32,
    "text_dim": 24,
    "text_len": 12,
    "num_heads": 3,
    "num_layers": 2,
}
GRIDS = {
    2: [(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    4: [(1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)],
    8: [(1, 2, 4), (2, 2, 2), (1, 1, 8)],
}
SIZES = [(3, 6, 10), (1, 6, 14)]  # 45 and 21 tokens: odd, and 3 heads


def make(**changes):
    torch.manual_seed(0)
    return WanModel("t2v", **(SHAPE | changes)).eval()


def _predict(model, x, t, texts, name, **inputs):
    return model(x, t, texts[name], **inputs)


def predictions(parallel, dtype=torch.float32):
    """Of latents of all sizes; of a batch; of timesteps by token; both branches, each in its way."""
    model, results = make(parallel=parallel).to(dtype), []
    torch.manual_seed(1)
    for size in SIZES:
        for batch in (1, 2):
            x, texts = torch.randn(batch, 4, *size), torch.randn(2, batch, 7, 24)
            count = size[0] * size[1] * size[2] // 4
            times = torch.full((batch, count), 700)
            times[:, : count // 3] = 0
            for t in (torch.tensor([500]), times):
                compute = partial(_predict, model, x, t, {"cond": texts[0], "uncond": texts[1]})
                results += parallel.branches(compute, ["cond", "uncond"]) + parallel.branches(compute, ["cond"])
    vace = make(parallel=parallel, vace_layers=[0, 1], vace_in_dim=6).to(dtype)
    inputs = {"vace_context": torch.randn(1, 6, *size), "vace_context_scale": 0.7}
    compute = partial(_predict, vace, x[:1], torch.tensor([500]), {"cond": texts[0, :1], "uncond": texts[1, :1]})
    results += parallel.branches(partial(compute, **inputs), ["cond", "uncond"])
    return results + spoken(parallel, dtype)


def spoken(parallel, dtype):
    """Of S2V, whose tokens come in groups, of which those of the video alone hear the audio, frame by frame: 60 tokens
    of 3 frames, and behind them others, beside which a rank may have none."""
    results, size = [], (3, 8, 10)
    for packed, adain in ((True, True), (False, False)):
        config = {"audio_inject_layers": [0, 1], "audio_dim": 8, "cond_dim": 4, "enable_adain": adain}
        model = make(parallel=parallel, enable_framepack=packed, **config).to(dtype)
        torch.manual_seed(2)
        x, pose = torch.randn(2, 1, 4, *size)
        motion, reference = torch.randn(1, 4, 5, *size[1:]), torch.randn(1, 4, 1, *size[1:])
        inputs = {"ref_latents": reference, "motion_latents": motion, "cond_states": pose, "motion_frames": (17, 5)}
        inputs |= {"audio_input": torch.randn(1, 25, 8, 12)}
        texts = torch.randn(2, 1, 7, 24)
        compute = partial(_predict, model, x, torch.tensor([500]), {"cond": texts[0], "uncond": texts[1]}, **inputs)
        results += parallel.branches(compute, ["cond", "uncond"])
    return results


def grids(shapes):
    with torch.inference_mode():
        return {str(shape): predictions(Parallel(*shape)) for shape in shapes}


@pytest.mark.parametrize("ranks", GRIDS)
def test_many_ranks_predict_what_one_does(ranks, tmp_path):
    with torch.inference_mode():
        wanted = predictions(Parallel())
    for rank, found in enumerate(run(ranks, grids, tmp_path, GRIDS[ranks])):
        for shape, results in found.items():
            for one, other in zip(results, wanted, strict=True):
                assert (one - other).abs().max() <= 1e-5 * other.abs().max(), (rank, shape)


def collectives():
    """What the calls of `Parallel` and of its shards make of known numbers."""
    parallel = Parallel(cfg=2, ring=1, ulysses=2)
    rank = parallel.world.rank
    tokens = parallel.tokens(5)
    whole = torch.arange(30.0).view(2, 5, 3)
    part = tokens.shard(whole, dim=1)
    both = parallel.branches(lambda name: torch.tensor([parallel.exchange((rank, len(name)))[1][1]]), ["a", "bcd"])
    return {
        "part": part,
        "whole": tokens.gather(part, dim=1),
        "scaled": tokens.gather(part.repeat_interleave(2, dim=1), dim=1, scale=2),
        "sum": list(parallel.reduce_scalar((float(rank), 1.0))),
        "apart": both,
        "once": parallel.once(lambda: [torch.tensor([rank]), torch.ones(2, 2, dtype=torch.bfloat16)], "cpu"),
    }


def test_collectives(tmp_path):
    whole = torch.arange(30.0).view(2, 5, 3)
    for rank, found in enumerate(run(4, collectives, tmp_path)):
        assert found["part"].equal(whole[:, :3] if rank % 2 == 0 else whole[:, 3:])
        assert found["whole"].equal(whole) and found["scaled"].equal(whole.repeat_interleave(2, dim=1))
        assert found["sum"] == [rank // 2 * 4 + 1, 2]
        assert [one.item() for one in found["apart"]] == [3, 3]
        assert found["once"][0].item() == 0 and found["once"][1].equal(torch.ones(2, 2, dtype=torch.bfloat16))


def test_alone_everything_is_the_identity():
    parallel, x = Parallel(), torch.randn(2, 5, 3)
    tokens = parallel.tokens(5)
    assert tokens.shard(x, dim=1) is x and tokens.gather(x, dim=1) is x
    assert parallel.reduce_scalar((1.5, 2.0)) == (1.5, 2.0)
    assert parallel.branches(str.upper, ("a", "b")) == ["A", "B"] and parallel.once(lambda: [x], "cpu")[0] is x


def test_runs_are_as_equal_as_may_be():
    assert split(12, 8) == [2, 2, 2, 2, 1, 1, 1, 1] and split(2, 4) == [1, 1, 0, 0]
    assert split(32760, 16) == [2048] * 8 + [2047] * 8


def test_parts_of_an_attention_merge_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8, generator=generator) for length in (5, 9, 9))
    k *= 4
    sdpa, out, lse = get_attention("sdpa"), None, None
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        out, lse = merge(out, lse, *sdpa.with_lse(q, k[:, part], v[:, part]))
    assert (out - sdpa(q, k, v)).abs().max() < 1e-6
