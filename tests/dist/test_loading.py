"""Weights that ranks share out: each reads its own rows, and the network computes what it computes alone."""

import pytest
import torch

from benchmarks import loading
from wan.distributed.parallel import Parallel
from tests.dist.processes import run
from wan.quant.linear import QuantLinear

pytestmark = pytest.mark.dist

# Rows of 96 and 160: no multiple of the ranks; a Q8_0 block has 32 weights.
SMALL = {"model_type": "i2v", "in_dim": 20, "dim": 96, "ffn_dim": 160, "num_heads": 3, "text_dim": 64, "text_len": 7}


VACE = SMALL | {"model_type": "vace", "in_dim": 16, "vace_layers": [0, 1], "vace_in_dim": 6}


def write_small(format, folder, monkeypatch, config=SMALL):
    monkeypatch.setattr(loading, "CONFIG", config)
    return loading.write(format, 0, folder)


def predict(model):
    generator = torch.Generator().manual_seed(5)
    shapes = (1, 20, 3, 6, 10), (1, 7, 64), (1, 257, 1280), (1, 6, 3, 6, 10)
    x, text, image, source = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = {"vace_context": source, "vace_context_scale": 0.7} if model.adapters else {"clip_fea": image}
    x = x[:, : model.patch_embedding.in_channels]
    with torch.inference_mode():
        return [model(x, torch.tensor([t]), text, **inputs) for t in (900, 10)]


def predict_shared(path, config):
    model = loading.load(path, config, sharded=True, parallel=Parallel(ulysses=3))
    packed = sum(isinstance(module, QuantLinear) for module in model.modules())
    kept = sum(one.to_local().numel() for one in model.parameters())
    return {"packed": packed, "kept": kept, "predictions": predict(model)}


@pytest.mark.parametrize("small, format", [*((SMALL, name) for name in loading.FORMATS), (VACE, "gguf")])
def test_shared_weights_compute_the_same(small, format, tmp_path, monkeypatch):
    path, config = write_small(format, tmp_path, monkeypatch, small)
    whole = loading.load(path, config, sharded=False)
    wanted, total = predict(whole), sum(one.numel() for one in whole.parameters())
    found = run(3, predict_shared, tmp_path, path, config)
    assert sum(one["kept"] for one in found) == total
    for one in found:
        assert (one["packed"] > 0) == (format == "gguf") and one["kept"] < 0.4 * total
        for mine, other in zip(one["predictions"], wanted, strict=True):
            assert (mine - other).abs().max() <= 0.02 * other.abs().max()  # bf16


@pytest.mark.parametrize("format", loading.FORMATS)
def test_a_rank_takes_its_share_and_one_tensor(format):
    result = loading.compare(format, 0.4, ranks=2)
    assert result["within_limit"], result
