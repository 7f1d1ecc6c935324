"""--dtype mixed: matrices in bf16, all that is computed in fp32: bit for bit fp32 with matrices so rounded."""

import pytest
import torch
from safetensors.torch import save_file
from wan.distributed.fsdp import shard_model, weight_mesh

from tests.dist.processes import run
from tests.unit.tiny_checkpoint import clip_state, dit_state, shrunk, t5_state, write_tokenizer
from wan.memory.experts import load_expert
from wan.models.dit import WanModel
from wan.models.encoders import load_clip_encoder, load_text_encoder
from wan.quant.wide import WideLinear
from wan.weights.lora import open_lora, set_loras, weight_shapes
from wan.weights.source import open_source

TYPES = {"dtype": torch.float32, "kept": torch.bfloat16}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def in_file(path, state):
    save_file({name: one.contiguous() for name, one in state.items()}, path)
    return open_source(path)


def rounded(state, names):
    return {name: one.bfloat16().float() if name in names else one for name, one in state.items()}


def dit(spec, source, **options):
    with torch.device("meta"):
        model = WanModel(**spec.dit)
    options = {"packed": False, "dtype": torch.float32, **options}
    return load_expert(model, source, device=CPU, compute_device=CPU, **options)


def matrices(model):
    return {f"{path}.weight" for path, one in model.named_modules() if isinstance(one, WideLinear)}


def predict(model, spec):
    random = torch.Generator().manual_seed(2)
    x = torch.randn(1, spec.dit.in_dim, 2, 4, 6, generator=random)
    text = torch.randn(1, 7, spec.dit.text_dim, generator=random)
    return model(x, torch.tensor([500.0]), text)


@pytest.fixture
def spec():
    return shrunk("t2v-1.3B")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"granularity": "block", "blocks_from": "ram"},
        {"granularity": "phase", "blocks_from": "disk", "resident_blocks": (1,)},
    ],
)
def test_a_transformer_computes_as_in_fp32_with_rounded_matrices(tmp_path, spec, how):
    """Resident, or streamed from RAM or from its file."""
    state = dit_state(spec)
    mixed = dit(spec, in_file(tmp_path / "a.safetensors", state), **TYPES, **how)
    names = matrices(mixed)
    assert len(names) == 2 * 10 + 3 and all(mixed.get_parameter(name).dtype == torch.bfloat16 for name in names)
    assert mixed.dtype == torch.float32 and mixed.time_embedding["0"].weight.dtype == torch.float32
    wanted = predict(dit(spec, in_file(tmp_path / "b.safetensors", rounded(state, names))), spec)
    for _ in range(2):  # what is widened leaves no trace
        assert torch.equal(predict(mixed, spec), wanted)


def test_loras_are_merged_into_the_kept_weights(tmp_path, spec):
    """As into those of a bf16 model, and go without a trace."""
    state = dit_state(spec)
    source = in_file(tmp_path / "a.safetensors", state)
    name = "blocks.0.self_attn.q.weight"
    factors = {"lora_A": torch.randn(4, 48), "lora_B": torch.randn(48, 4)}
    in_file(tmp_path / "lora.safetensors", {f"{name[:-7]}.{part}.weight": one for part, one in factors.items()})
    mixed, narrow = dit(spec, source, **TYPES), dit(spec, source, dtype=torch.bfloat16)
    plain = predict(mixed, spec)
    lora = open_lora(tmp_path / "lora.safetensors", weight_shapes(mixed))
    for model in (mixed, narrow):
        set_loras(model, source, [(lora, 0.5)])
    assert torch.equal(mixed.get_parameter(name), narrow.get_parameter(name))
    assert not torch.equal(predict(mixed, spec), plain)
    set_loras(mixed, source, [])
    assert torch.equal(predict(mixed, spec), plain)


def test_quantised_weights_are_not_rounded_again(tmp_path, spec):
    """Packed or dequantised, the bits are the same: those of fp32."""
    state = dit_state(spec)
    name = "blocks.1.ffn.0.weight"
    scale = state[name].abs().amax(1, keepdim=True) / 127
    stored = {**state, name: (state[name] / scale).round().to(torch.int8), f"{name[:-7]}.weight_scale": scale}
    source = in_file(tmp_path / "a.safetensors", stored)
    packed, dense = (dit(spec, source, packed=packed, **TYPES) for packed in (True, False))
    assert dense.get_parameter(name).dtype == torch.float32
    assert torch.equal(predict(packed, spec), predict(dense, spec))


def predict_shared(path):
    spec, mesh = shrunk("t2v-1.3B"), weight_mesh("cpu", 2)
    with torch.inference_mode():
        model = dit(spec, open_source(path), **TYPES, shard=lambda model, units: shard_model(model, units, mesh))
        kept = sum(one.to_local().nbytes for one in model.parameters())
        return {"made": predict(model, spec), "kept": kept}


@pytest.mark.dist
def test_shared_out_among_ranks(tmp_path, spec):
    source = in_file(tmp_path / "a.safetensors", dit_state(spec))
    whole = dit(spec, source, **TYPES)
    wanted, total = predict(whole, spec), sum(one.nbytes for one in whole.parameters())
    for one in run(2, predict_shared, tmp_path, tmp_path / "a.safetensors"):
        assert torch.equal(one["made"], wanted) and one["kept"] < 0.55 * total


def test_encoders(tmp_path, spec):
    write_tokenizer(tmp_path / "tokenizer")
    text, clip = t5_state(spec), clip_state()
    made = {}
    for kind, types in (("mixed", TYPES), ("fp32", {"dtype": torch.float32})):
        sources = [
            in_file(tmp_path / f"{kind}{i}.safetensors", _rounded_matrices(state) if kind == "fp32" else state)
            for i, state in enumerate((text, clip))
        ]
        encoder = load_text_encoder(sources[0], tmp_path / "tokenizer", text_len=32, **types)
        looks = load_clip_encoder(sources[1], **types)
        picture = torch.linspace(-1, 1, 3 * 40 * 30).view(3, 1, 40, 30)
        made[kind] = encoder(["a b"])[0], looks([picture])
        last = encoder.model.encoder.block[0].layer[1].DenseReluDense.wo
        assert encoder.model.shared.weight.dtype == last.weight.dtype == types.get("kept", torch.float32)
    for mixed, wide in zip(made["mixed"], made["fp32"], strict=True):
        assert mixed.dtype == torch.float32 and torch.equal(mixed, wide)


def _rounded_matrices(state):
    """Of an encoder: all that is no norm, bias or convolution."""
    whole = ("patch", "cls", "norm", "ln", "bias")
    is_matrix = {name: one.ndim > 1 and not any(part in name for part in whole) for name, one in state.items()}
    return {name: one.bfloat16().float() if is_matrix[name] else one for name, one in state.items()}
