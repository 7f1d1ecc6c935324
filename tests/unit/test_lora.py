"""LoRA files of every format: what they change, by formulas written out here, merged and beside packed weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.dist.processes import run
from tests.unit.test_dit import SHAPE, latents, make, texts
from tests.unit.weight_helpers import DictSource
from wan.errors import SwanError
from wan.models.dit import WanModel
from wan.quant.linear import QuantLinear
from wan.weights.assign import load_weights
from wan.weights.lora import open_lora, set_loras, weight_shapes
from wan.weights.lora_formulas import Dense, Dora, Kron, LowRank
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

SIZES = SHAPE | {"dim": 64, "ffn_dim": 96}  # rows of whole Q8_0 blocks
STATE = {name: one.detach().clone() for name, one in make(dim=64, ffn_dim=96).state_dict().items()}
BASE = DictSource(STATE)
Q, FFN, PATCH = "blocks.1.self_attn.q", "blocks.0.ffn.0", "patch_embedding"
ROWS, COLUMNS = 96, 64  # of FFN's weight

with torch.device("meta"):
    SHAPES = weight_shapes(WanModel(**SIZES))
    IMAGE_SHAPES = weight_shapes(WanModel("flf2v", **SIZES))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


@pytest.fixture
def lora(tmp_path):
    """lora(tensors) -> the opened file."""

    def of(tensors, shapes=SHAPES, metadata=None, name="a.safetensors"):
        save_file({key: one.clone().contiguous() for key, one in tensors.items()}, tmp_path / name, metadata)
        return open_lora(tmp_path / name, shapes)

    return of


def load(source=BASE, stream=False, dtype=torch.float32):
    with torch.device("meta"):
        model = WanModel(**SIZES)
    return load_weights(model, source, "dit", dtype=dtype, stream=stream)


def with_loras(*loras, **options):
    model = load(**options)
    set_loras(model, options.get("source", BASE), loras)
    return model


def changes(*loras):
    """Parameter -> what was added to it, for those that are no longer what they were."""
    parameters = dict(with_loras(*loras).named_parameters())
    return {
        name: one - STATE[name] for name, one in parameters.items() if not torch.equal(one, STATE[name].view_as(one))
    }


def only(found, name, wanted):
    assert list(found) == [name]
    torch.testing.assert_close(found[name], wanted.view_as(found[name]), rtol=1e-4, atol=1e-5)


def predict(model):
    with torch.inference_mode():
        return model(torch.stack(latents((2, 4, 4))), torch.tensor([500]), texts(5))


def pair(rows=ROWS, columns=COLUMNS, rank=4):
    return noise(rows, rank), noise(rank, columns, seed=1)


# Names

DOTTED = [
    *("diffusion_model.", "model.diffusion_model.", "transformer.", "base_model.model."),
    *("base_model.model.diffusion_model.", "pipe.dit.", "model.", "unet.", ""),
]
FLAT = ["lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_", "lora_prior_unet_"]
NAMES = {
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.1.cross_attn.k": "blocks.1.attn2.to_k",
    "blocks.0.cross_attn.v_img": "blocks.0.attn2.add_v_proj",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.0.ffn.2": "blocks.0.ffn.net.2",
    "head.head": "proj_out",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj",
}


@pytest.mark.parametrize("theirs", [False, True], ids=["official", "diffusers"])
@pytest.mark.parametrize("prefix", DOTTED + FLAT)
def test_every_prefix_and_name(lora, prefix, theirs):
    tensors = {}
    for ours, diffusers in NAMES.items():
        rows, columns = IMAGE_SHAPES[f"{ours}.weight"]
        module = diffusers if theirs else ours
        stem = prefix + (module.replace(".", "_") if prefix in FLAT else module)
        tensors |= {f"{stem}.lora_up.weight": noise(rows, 2), f"{stem}.lora_down.weight": noise(2, columns)}
    opened = lora(tensors, IMAGE_SHAPES)
    assert opened.targets == {f"{name}.weight": IMAGE_SHAPES[f"{name}.weight"] for name in NAMES}
    assert opened.notes == ()


@pytest.mark.parametrize("theirs", [False, True], ids=["official", "diffusers"])
@pytest.mark.parametrize(
    "prefix",
    [
        *("dit.", "lora_dit_", "net.", "pipe.dit.model.", "module.", "_orig_mod.", "lora_unet__orig_mod_", "a.b.c."),
        *("base_model.model.transformer.", "lora_model_diffusion_model_", "diffusion_model.lora_unet_", ""),
    ],
)
def test_dots_and_underscores_in_any_mixture_under_any_prefix(lora, prefix, theirs):
    modules = ["blocks.1.attn2.to_k", "blocks.0.ffn.net.0.proj"] if theirs else ["blocks.1.cross_attn.k", FFN]
    b, a = zip(pair(64, 64), pair())
    for dots in ("all", "none", "first", "last", "wrapped"):
        tensors = {}
        for module, up, down in zip(modules, b, a):
            first, _, rest = module.partition(".")
            head, _, last = module.rpartition(".")
            stem = {
                "all": module,
                "none": module.replace(".", "_"),
                "first": f"{first}.{rest.replace('.', '_')}",
                "last": f"{head.replace('.', '_')}.{last}",
                "wrapped": f"{first}._orig_mod.{rest}",
            }[dots]
            tensors |= {f"{prefix}{stem}.lora_up.weight": up, f"{prefix}{stem}.lora_down.weight": down}
        assert lora(tensors).targets.keys() == {"blocks.1.cross_attn.k.weight", f"{FFN}.weight"}


@pytest.mark.parametrize(
    "prefix", ["vace_", "lora_unet_vace_", "lora_te_", "text_encoder.", "lora_te1_", "audio.", "my_"]
)
def test_modules_of_other_networks_are_not_taken_for_ours(lora, prefix):
    with pytest.raises(SwanError, match="nothing fits"):
        lora({f"{prefix}{FFN}.lora_up.weight": pair()[0], f"{prefix}{FFN}.lora_down.weight": pair()[1]})


def halves(high="transformer.", low="transformer_2."):
    tensors = {}
    for prefix, seed in ((high, 3), (low, 5)):
        tensors |= {
            f"{prefix}{FFN}.lora_up.weight": noise(ROWS, 4, seed=seed),
            f"{prefix}{FFN}.lora_down.weight": pair()[1],
        }
    return tensors, noise(ROWS, 4, seed=3) @ pair()[1], noise(ROWS, 4, seed=5) @ pair()[1]


@pytest.mark.parametrize(
    "high, low",
    [
        ("transformer.", "transformer_2."),
        ("transformer_1.", "transformer_2."),
        ("base_model.model.transformer.", "base_model.model.transformer_2."),
        ("lora_transformer_", "lora_transformer_2_"),
        ("high_noise_model.", "low_noise_model."),
    ],
)
def test_a_file_for_two_experts_gives_each_its_half(lora, tmp_path, high, low):
    tensors, of_high, of_low = halves(high, low)
    with pytest.raises(SwanError, match="halves for the two experts .* this task has one transformer"):
        lora(tensors)
    for expert, wanted in (("high", of_high), ("low", of_low)):
        only(changes((open_lora(tmp_path / "a.safetensors", SHAPES, expert), 1)), f"{FFN}.weight", wanted)


def test_half_a_file_for_two_experts(lora, tmp_path):
    tensors, _, of_low = halves()
    save_file({key: one for key, one in tensors.items() if "transformer_2." in key}, tmp_path / "low.safetensors")
    only(changes((open_lora(tmp_path / "low.safetensors", SHAPES, "low"), 1)), f"{FFN}.weight", of_low)
    other = open_lora(tmp_path / "low.safetensors", SHAPES, "high")
    assert not other.targets and "is for the low-noise expert only" in other.notes[0]
    save_file(tensors | {f"diffusion_model.{Q}.diff_b": noise(64)}, tmp_path / "odd.safetensors")
    with pytest.raises(SwanError, match=r"diffusion_model.blocks.1.self_attn.q.diff_b is in neither"):
        open_lora(tmp_path / "odd.safetensors", SHAPES, "high")


def test_each_half_has_the_alpha_that_diffusers_keeps_for_it(lora, tmp_path):
    tensors, of_high, of_low = halves()
    told = {"transformer.lora_alpha": 8, "transformer_2.lora_alpha": 2}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    for expert, wanted in (("high", 2 * of_high), ("low", of_low / 2)):
        only(changes((open_lora(tmp_path / "a.safetensors", SHAPES, expert), 1)), f"{FFN}.weight", wanted)


def test_no_two_modules_go_by_one_name():
    from wan.weights.lora_file import _table

    flat = {name.replace(".", "_"): name for name in _table(IMAGE_SHAPES) if "." in name}
    assert len(flat) == len({name for name in _table(IMAGE_SHAPES) if "." in name})


UP_DOWN = [
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B.my_style-2.weight", ".lora_A.my_style-2.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora.B.weight", ".lora.A.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
]


@pytest.mark.parametrize("up, down", UP_DOWN)
def test_low_rank(lora, up, down):
    b, a = pair()
    tensors = {f"transformer.blocks.0.ffn.net.0.proj{up}": b, f"transformer.blocks.0.ffn.net.0.proj{down}": a}
    only(changes((lora(tensors), 0.5)), f"{FFN}.weight", 0.5 * b @ a)
    tensors["transformer.blocks.0.ffn.net.0.proj.alpha"] = torch.tensor(3.0)
    only(changes((lora(tensors), -1)), f"{FFN}.weight", -3 / 4 * b @ a)


def peft(module=f"base_model.model.{FFN}"):
    b, a = pair()
    return {f"{module}.lora_B.weight": b, f"{module}.lora_A.weight": a}, b @ a


@pytest.mark.parametrize(
    "config, scale",
    [
        ({"lora_alpha": 8, "r": 4}, 2),
        ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4),
        ({"lora_alpha": 8, "alpha_pattern": {"ffn.0": 2}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"ffn": 2, r"blocks\.1.*": 3}}, 2),
        ({"r": 4}, 1),
    ],
)
def test_what_peft_keeps_beside_the_tensors(lora, tmp_path, config, scale):
    tensors, product = peft()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    only(changes((lora(tensors, name="adapter_model.safetensors"), 1)), f"{FFN}.weight", scale * product)
    assert open_lora(tmp_path, SHAPES).targets  # the folder
    only(changes((lora(tensors, name="other.safetensors"), 1)), f"{FFN}.weight", product)  # not this one's
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    only(changes((lora(tensors, metadata=texts), 1)), f"{FFN}.weight", scale * product)
    packed = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    only(changes((lora(tensors, metadata={"lora_adapter_metadata": packed}), 1)), f"{FFN}.weight", scale * product)
    stored = tensors | {f"base_model.model.{FFN}.alpha": torch.tensor([4])}  # what the file says of a module goes first
    only(changes((lora(stored, metadata=texts), 1)), f"{FFN}.weight", product)


def test_a_damaged_configuration_is_one_line(lora, tmp_path):
    tensors, _ = peft()
    for metadata in ({"lora_alpha": "much"}, {"lora_adapter_metadata": "{"}, {"alpha_pattern": '{"(": 1}'}):
        with pytest.raises(SwanError, match="damaged"):
            lora(tensors, metadata=metadata)


@pytest.mark.parametrize(
    "told",
    [
        *({"lora_alpha": one} for one in ("NaN", "Infinity", "1e999", "[]", "{}", "true", '"x"', "1" + "0" * 400)),
        *({"alpha_pattern": one} for one in ("[1]", "3", '{"ffn.0": null}', '{"ffn.0": NaN}', '{"(": 1}')),
        *({"lora_adapter_metadata": one} for one in ("[1]", "null", "[" * 9999, '{"transformer.lora_alpha": []}')),
    ],
)
def test_what_a_configuration_cannot_say(lora, told):
    with pytest.raises(SwanError, match="damaged") as error:
        lora(peft()[0], metadata=told)
    assert "\n" not in str(error.value) and "a.safetensors" in str(error.value) and len(str(error.value)) < 400


def test_patterns_are_names_and_no_regular_expressions(lora):
    tensors, product = peft()

    def scale(patterns):
        opened = lora(tensors, metadata={"lora_alpha": "8", "alpha_pattern": json.dumps(patterns)})
        return (changes((opened, 1))[f"{FFN}.weight"] / product).mean().item(), opened.notes

    for pattern in (FFN, "ffn.0", "0", rf"^{FFN}$", FFN.replace(".", r"\."), f"base_model.model.{FFN}"):
        assert scale({pattern: 2}) == (pytest.approx(0.5, rel=1e-4), ())
    for pattern in ("n.0", "blocks.1.ffn.0", "blocksx0.ffn.0"):
        assert scale({pattern: 2}) == (pytest.approx(2, rel=1e-4), ())
    for pattern in ("(b+)+$", "(.*)*x", r"blocks\.\d+\.ffn", ".*" * 5000 + "x"):
        found, notes = scale({pattern: 2})
        assert found == pytest.approx(2, rel=1e-4) and "is a regular expression, which is not obeyed" in notes[0]
    found, _ = scale({f"module{index}": 3 for index in range(100_000)} | {"ffn.0": 2})
    assert found == pytest.approx(0.5, rel=1e-4)


# Numbers


BROKEN = {
    "up": lambda b, a: (b.index_fill(0, torch.tensor(3), float("nan")), a, None),
    "down": lambda b, a: (b, a.index_fill(0, torch.tensor(1), float("inf")), None),
    "alpha": lambda b, a: (b, a, float("nan")),
    "endless alpha": lambda b, a: (b, a, float("-inf")),
}


@pytest.mark.parametrize("stream", [False, True], ids=["merged", "packed"])
@pytest.mark.parametrize("broken", BROKEN)
def test_factors_that_are_not_finite_are_named(lora, packed, broken, stream):
    b, a, alpha = BROKEN[broken](*pair())
    tensors = {f"dit.{FFN}.lora_up.weight": b, f"dit.{FFN}.lora_down.weight": a}
    tensors |= {} if alpha is None else {f"dit.{FFN}.alpha": torch.tensor(alpha)}
    opened = lora(tensors)
    with pytest.raises(SwanError, match=rf"a.safetensors: tensor dit.{FFN}.*{broken.split()[-1]}.* infinite or NaN"):
        with_loras((opened, 1), source=packed, stream=stream)


@pytest.mark.parametrize("stream", [False, True], ids=["merged", "packed"])
@pytest.mark.parametrize("kind, size, alpha", [("float32", 1e38, 1e6), ("float16", 1e3, 1e5), ("float16", 1, 1e38)])
def test_what_overflows_is_refused(lora, packed, kind, size, alpha, stream):
    b, a = pair()
    tensors = {f"{FFN}.lora_up.weight": b * size, f"{FFN}.lora_down.weight": a, f"{FFN}.alpha": torch.tensor(alpha)}
    opened, options = lora(tensors), {"source": packed, "stream": stream, "dtype": getattr(torch, kind)}
    with pytest.raises(SwanError, match=rf"a.safetensors: what {FFN}.*lora_.* at strength 1 is more than {kind} holds"):
        with_loras((opened, 1), **options)
    with_loras((opened, 0), **options)


def test_large_factors_of_a_small_product_are_no_overflow(lora, packed):
    """Beside packed weights the product is not made; that it is small is found out where the factors do not say it."""
    b, a = pair()
    tensors = {f"{FFN}.lora_up.weight": b * 1e30, f"{FFN}.lora_down.weight": a * 1e-30}
    streamed = with_loras((lora(tensors), 1), source=packed, stream=True)
    resident = with_loras((lora(tensors), 1), source=packed)
    assert (predict(streamed) - predict(resident)).abs().max() < 1e-4
    far = torch.zeros(ROWS, 2), torch.zeros(2, COLUMNS)  # each factor is large where the other one is zero
    far[0][:, 0], far[1][1] = 1e25, 1e25
    opened = lora({f"{FFN}.lora_up.weight": far[0], f"{FFN}.lora_down.weight": far[1]})
    with_loras((opened, 1), source=packed, stream=True)


def test_alphas_of_any_finite_size_are_obeyed(lora):
    b, a = pair()
    for alpha in (0.0, -2.0, 1e-30, 300.0):
        tensors = {f"{FFN}.lora_up.weight": b, f"{FFN}.lora_down.weight": a, f"{FFN}.alpha": torch.tensor([[alpha]])}
        found = changes((lora(tensors), 1)).get(f"{FFN}.weight", torch.zeros(ROWS, COLUMNS))
        torch.testing.assert_close(found, alpha / 4 * b @ a, rtol=1e-4, atol=1e-4)


def test_bias_of_peft(lora):
    b, a, bias = *pair(), noise(ROWS)
    tensors = {f"{FFN}.lora_A.weight": a, f"{FFN}.lora_B.weight": b, f"{FFN}.lora_B.bias": bias}
    found = changes((lora(tensors | {f"{FFN}.alpha": torch.tensor(2.0)}), 0.5))
    only({f"{FFN}.bias": found.pop(f"{FFN}.bias")}, f"{FFN}.bias", 0.5 * 0.5 * bias)
    only(found, f"{FFN}.weight", 0.5 * 0.5 * b @ a)


def test_convolution(lora):
    up, down, mid = noise(64, 3, 1, 1, 1), noise(3, 6, 1, 2, 2), noise(3, 3, 1, 2, 2)
    keys = {f"lora_unet_patch_embedding.lora_{one}.weight": one for one in ("up", "down", "mid")}
    wanted = torch.einsum("or,rcthw->octhw", up[..., 0, 0, 0], down)
    found = changes((lora(dict(zip(keys, (up, down)))), 1))
    only(found, f"{PATCH}.weight", wanted)
    found = changes((lora(dict(zip(keys, (up, down.flatten(1))))), 1))
    only(found, f"{PATCH}.weight", wanted)
    pointwise = noise(3, 6, 1, 1, 1)
    wanted = torch.einsum("op,pqthw,qc->octhw", up[..., 0, 0, 0], mid, pointwise[..., 0, 0, 0])
    only(changes((lora(dict(zip(keys, (up, pointwise, mid)))), 1)), f"{PATCH}.weight", wanted)


# The other families: (keys after the module, what strength 1 adds to a weight w [ROWS, COLUMNS])


def lokr(**parts):
    return {f".lokr_{name}": one for name, one in parts.items()}


def hada(**parts):
    return {f".hada_{name}": one for name, one in parts.items()}


def kron(a, b):
    return torch.einsum("ab,cd->acbd", a, b).reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def families():
    b, a = pair()
    low = {".lora_up.weight": b, ".lora_down.weight": a, ".alpha": torch.tensor(2.0)}
    w1, w2, w1_a, w1_b, w2_a, w2_b = (noise(*s) for s in ((8, 4), (12, 16), (8, 2), (2, 4), (12, 3), (3, 16)))
    h = {
        "w1_a": noise(ROWS, 2),
        "w1_b": noise(2, COLUMNS),
        "w2_a": noise(ROWS, 3, seed=5),
        "w2_b": noise(3, COLUMNS, seed=5),
    }
    m = noise(ROWS, seed=7).abs() + 0.5
    columns = noise(1, COLUMNS, seed=8).abs() + 0.5

    def dora(magnitude, axis, delta):
        return lambda w: magnitude * (w + delta) / torch.linalg.vector_norm(w + delta, dim=axis, keepdim=True) - w

    rows = m[:, None]
    alpha = {".alpha": torch.tensor(1.5)}
    t = {"t1": noise(2, 2), "t2": noise(3, 3)}
    tucker = {"w1_a": noise(2, ROWS), "w1_b": noise(2, COLUMNS), "w2_a": noise(3, ROWS), "w2_b": noise(3, COLUMNS)} | t
    full, value = noise(ROWS, COLUMNS, seed=2), noise(ROWS, COLUMNS, seed=3)
    return {
        "lora": (low, lambda w: 0.5 * b @ a, LowRank),
        "dora rows": (low | {".dora_scale": rows}, dora(rows, 1, 0.5 * b @ a), Dora),
        "dora flat": (low | {".lora_magnitude_vector": m}, dora(rows, 1, 0.5 * b @ a), Dora),
        "dora peft": (low | {".lora_magnitude_vector.default.weight": m}, dora(rows, 1, 0.5 * b @ a), Dora),
        "dora columns": (low | {".dora_scale": columns}, dora(columns, 0, 0.5 * b @ a), Dora),
        "lokr": (lokr(w1=w1, w2=w2) | {".alpha": torch.tensor(1e10)}, lambda w: kron(w1, w2), Kron),
        "lokr w2 in two": (
            lokr(w1=w1, w2_a=w2_a, w2_b=w2_b) | alpha,
            lambda w: 1.5 / 3 * kron(w1, w2_a @ w2_b),
            Kron,
        ),
        "lokr w1 in two": (
            lokr(w1_a=w1_a, w1_b=w1_b, w2=w2) | alpha,
            lambda w: 1.5 / 2 * kron(w1_a @ w1_b, w2),
            Kron,
        ),
        "lokr both in two": (
            lokr(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b) | alpha,
            lambda w: 1.5 / 3 * kron(w1_a @ w1_b, w2_a @ w2_b),
            Kron,
        ),
        "lokr dora": (lokr(w1=w1, w2=w2) | {".dora_scale": rows}, dora(rows, 1, kron(w1, w2)), Dora),
        "loha": (
            hada(**h) | alpha,
            lambda w: 1.5 / 2 * (h["w1_a"] @ h["w1_b"]) * (h["w2_a"] @ h["w2_b"]),
            LowRank,
        ),
        "loha tucker": (
            hada(**tucker),
            lambda w: (tucker["w1_a"].T @ t["t1"] @ tucker["w1_b"]) * (tucker["w2_a"].T @ t["t2"] @ tucker["w2_b"]),
            Dense,
        ),
        "diff": ({".diff": full, ".alpha": torch.tensor(9.0)}, lambda w: full, Dense),
        "set": ({".set_weight": value}, lambda w: value - w, Dense),
        "w_norm": ({".w_norm": full}, lambda w: full, Dense),
    }


FAMILIES = families()


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_families(lora, family):
    tensors, formula, _ = family
    opened = lora({f"lycoris_blocks_0_ffn_0{key}": one for key, one in tensors.items()})
    assert opened.targets == {f"{FFN}.weight": (ROWS, COLUMNS)}
    weight = STATE[f"{FFN}.weight"]
    for strength in (1, 0.3):
        only(changes((opened, strength)), f"{FFN}.weight", strength * formula(weight))

    def base(rows):
        return weight if rows is None else weight[slice(*rows)]

    part = opened.delta(f"{FFN}.weight", base, (10, 50))
    torch.testing.assert_close(part, formula(weight)[10:50], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "dit.gguf"
    export_gguf(BASE, path, "Q8_0")
    return open_source(path)


def test_beside_packed_weights_is_as_merged_into_dense_ones(lora, family, packed):
    tensors, _, kind = family
    b, a = pair(64, 64)
    others = {f"{Q}.lora_up.weight": b, f"{Q}.lora_down.weight": a, f"{Q}.diff_b": noise(64)}
    opened = lora({f"{FFN}{key}": one for key, one in tensors.items()} | others)
    streamed = with_loras((opened, 0.7), source=packed, stream=True)
    layer = streamed.get_submodule(FFN)
    assert isinstance(layer, QuantLinear) and [type(one) for one in layer.branches] == [kind]
    resident = predict(with_loras((opened, 0.7), source=packed))
    difference = (predict(streamed) - resident).abs().max()
    assert difference <= 2e-5 * resident.abs().max()
    assert (predict(load(packed)) - resident).abs().max() > 100 * difference
    set_loras(streamed, packed, [])
    assert len(layer.branches) == 0 and torch.equal(predict(streamed), predict(load(packed, stream=True)))


def test_loha_of_high_rank_beside_packed_weights(lora, packed):
    h = hada(w1_a=noise(ROWS, 8), w1_b=noise(8, COLUMNS), w2_a=noise(ROWS, 8, seed=5), w2_b=noise(8, COLUMNS, seed=5))
    opened = lora({f"{FFN}{key}": one for key, one in h.items()})
    streamed = with_loras((opened, 1), source=packed, stream=True)
    assert [type(one) for one in streamed.get_submodule(FFN).branches] == [Dense]  # less than 64 pairs would take
    resident = predict(with_loras((opened, 1), source=packed))
    assert (predict(streamed) - resident).abs().max() <= 2e-5 * resident.abs().max()


def test_bf16_is_rounded_once(lora):
    b, a = pair()
    opened = lora({f"{FFN}.lora_up.weight": b, f"{FFN}.lora_down.weight": a})
    weight = with_loras((opened, 1), dtype=torch.bfloat16).get_submodule(FFN).weight
    assert torch.equal(weight, (STATE[f"{FFN}.weight"] + b @ a).bfloat16())


# Norms, biases, modulation, convolutions


@pytest.mark.parametrize(
    "key, name, shape",
    [
        (f"diffusion_model.{Q}.diff_b", f"{Q}.bias", (64,)),
        ("diffusion_model.blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight", (64,)),
        ("diffusion_model.blocks.0.norm3.diff", "blocks.0.norm3.weight", (64,)),
        ("diffusion_model.blocks.0.norm3.diff_b", "blocks.0.norm3.bias", (64,)),
        ("transformer.blocks.0.norm2.diff", "blocks.0.norm3.weight", (64,)),
        ("diffusion_model.blocks.0.norm3.w_norm", "blocks.0.norm3.weight", (64,)),
        ("diffusion_model.blocks.0.norm3.b_norm", "blocks.0.norm3.bias", (64,)),
        ("diffusion_model.blocks.1.diff_m", "blocks.1.modulation", (1, 6, 64)),
        ("diffusion_model.blocks.1.modulation.diff", "blocks.1.modulation", (1, 6, 64)),
        ("lora_unet_blocks_1.diff_m", "blocks.1.modulation", (6, 64)),
        ("transformer.blocks.1.scale_shift_table.diff", "blocks.1.modulation", (1, 6, 64)),
        ("diffusion_model.head.diff_m", "head.modulation", (1, 2, 64)),
        ("diffusion_model.head.modulation.diff", "head.modulation", (1, 2, 64)),
        ("diffusion_model.head.head.diff", "head.head.weight", (16, 64)),
        ("diffusion_model.patch_embedding.diff", f"{PATCH}.weight", (64, 6, 1, 2, 2)),
        ("diffusion_model.patch_embedding.diff_b", f"{PATCH}.bias", (64,)),
    ],
)
def test_single_tensors(lora, key, name, shape):
    value = noise(*shape)
    only(changes((lora({key: value}), 0.5)), name, 0.5 * value)


def test_input_channels_of_conditions(lora):
    """A LoRA of a model without them gets zeros for them; what a model does not take is reported, not applied."""
    fewer, more = noise(64, 4, 1, 2, 2), noise(64, 9, 1, 2, 2)
    [found] = changes((lora({"patch_embedding.diff": fewer}), 1)).values()
    torch.testing.assert_close(found[:, :4], fewer, rtol=1e-4, atol=1e-5)
    assert not found[:, 4:].any()
    opened = lora({"patch_embedding.diff": more, f"{Q}.diff_b": noise(64)})
    assert list(opened.targets) == [f"{Q}.bias"] and "1 of 2 keys are not used" in opened.notes[0]


def test_reshape(lora):
    tensors = {"patch_embedding.diff": noise(64, 6, 1, 2, 2)}
    same = tensors | {"patch_embedding.reshape_weight": torch.tensor([64, 6, 1, 2, 2])}
    assert list(lora(same).targets) == [f"{PATCH}.weight"]
    with pytest.raises(SwanError, match="patch_embedding.weight is to be reshaped to .64, 9"):
        lora(tensors | {"patch_embedding.reshape_weight": torch.tensor([64, 9, 1, 2, 2])})


# Setting them


def styles(lora):
    b, a = pair()
    one = lora({f"{FFN}.lora_up.weight": b, f"{FFN}.lora_down.weight": a, "blocks.0.diff_m": noise(1, 6, 64)}, name="1")
    c, d = noise(64, 2), noise(2, 64)
    two = lora({f"{FFN}.diff": noise(ROWS, COLUMNS), f"{Q}.lora_up.weight": c, f"{Q}.lora_down.weight": d}, name="2")
    return one, two


def same(model, other):
    """Whether all parameters, and all side branches, have the same bits."""
    ours, others = (dict(one.named_parameters()) | dict(one.named_buffers()) for one in (model, other))
    return ours.keys() == others.keys() and all(torch.equal(one, others[name]) for name, one in ours.items())


@pytest.mark.parametrize("form", ["fp32", "bf16", "resident", "stream"])
def test_add_change_and_remove(lora, packed, form):
    """At any time the model has the bits of one that was loaded with the same LoRAs."""
    options = {"fp32": {}, "bf16": {"dtype": torch.bfloat16}}.get(form, {"source": packed, "stream": form == "stream"})
    one, two = styles(lora)
    model, bare = load(**options), load(**options)
    for loras in ([(one, 1)], [(one, 1), (two, 0.5)], [(one, 0.2), (two, 0.5)], [(two, 2)], [(two, 0), (one, 0)]):
        set_loras(model, options.get("source", BASE), loras)
        assert same(model, with_loras(*loras, **options))
        assert same(model, bare) == all(strength == 0 for _, strength in loras)
    set_loras(model, options.get("source", BASE), [(one, 1)])
    set_loras(model, options.get("source", BASE), [])
    assert same(model, bare) and torch.equal(predict(model), predict(bare))


def test_two_add_up(lora):
    one, two = styles(lora)
    both, first, second = changes((one, 0.4), (two, 2)), changes((one, 0.4)), changes((two, 2))
    torch.testing.assert_close(both[f"{FFN}.weight"], first[f"{FFN}.weight"] + second[f"{FFN}.weight"])
    assert both.keys() == first.keys() | second.keys()


def test_what_stays_is_not_computed_again(lora):
    one, two = styles(lora)
    model, read = with_loras((one, 1)), []

    class Counting(DictSource):
        def read(self, name, rows=None):
            read.append(name)
            return super().read(name, rows)

    set_loras(model, Counting(STATE), [(one, 1), (two, 1)])
    assert sorted(read) == [f"{FFN}.weight", f"{Q}.weight"]
    set_loras(model, Counting(STATE), [(one, 1), (two, 1)])
    assert len(read) == 2


def test_an_update_of_zeros_changes_no_bit(lora):
    state = STATE | {f"{Q}.bias": torch.full((64,), -0.0)}
    model = load(DictSource(state))
    set_loras(model, DictSource(state), [(lora({f"{Q}.diff_b": torch.zeros(64)}), 1)])
    assert torch.signbit(model.get_submodule(Q).bias).all()


def test_a_model_of_inference_mode_takes_them_outside_of_it(lora):
    with torch.inference_mode():
        model = load()
    one, _ = styles(lora)
    set_loras(model, BASE, [(one, 1)])
    assert same(model, with_loras((one, 1)))


STRENGTHS = (0.5, 1, 0)  # before the first forward, and after it


def predict_shared(path, file):
    from wan.distributed.fsdp import shard_model, weight_mesh

    mesh, results = weight_mesh("cpu", 3), []
    for stream in (False, True):
        with torch.device("meta"):
            model = WanModel(**SIZES)
        source, shard = open_source(path), lambda model: shard_model(model, list(model.units().values()), mesh)
        load_weights(model, source, "dit", dtype=torch.float32, stream=stream, shard=shard)
        opened = open_lora(file, weight_shapes(model))
        for strength in STRENGTHS:
            set_loras(model, source, [(opened, strength)])
            results.append(predict(model))
    return results


@pytest.mark.dist
def test_shared_weights(lora, packed, tmp_path):
    tensors = {"blocks.0.diff_m": noise(1, 6, 64), "head.head.diff_b": noise(16)}
    for index, name in enumerate(("dora columns", "lora")):
        tensors |= {f"blocks.{index}.ffn.0{key}": one for key, one in FAMILIES[name][0].items()}
    opened = lora(tensors)
    found = run(3, predict_shared, tmp_path, packed.paths[0], opened.path)
    for index, strength in enumerate(STRENGTHS * 2):
        wanted = predict(with_loras((opened, strength), source=packed, stream=index >= len(STRENGTHS)))
        for one in found:
            assert (one[index] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# What does not fit


def low_rank(module, rows=64, columns=64):
    b, a = pair(rows, columns)
    return {f"diffusion_model.{module}.lora_up.weight": b, f"diffusion_model.{module}.lora_down.weight": a}


def test_unused_keys_are_counted_by_family(lora):
    tensors = low_rank(Q) | low_rank("blocks.0.cross_attn.k_img") | low_rank("blocks.1.cross_attn.v_img")
    tensors |= low_rank("vace_blocks.0.self_attn.q") | low_rank("blocks.9.self_attn.q") | low_rank("blocks.0.motion.1")
    tensors |= {"diffusion_model.img_emb.proj.0.diff": noise(64), "lora_te_layers_0.lora_up.weight": noise(4, 4)}
    tensors |= {"diffusion_model.blocks.0.norm3.odd": noise(4)}
    opened = lora(tensors)
    assert list(opened.targets) == [f"{Q}.weight"]
    [note] = opened.notes
    total, unused = len(tensors), len(tensors) - 2
    assert note.startswith("warning: ") and f"{unused} of {total} keys are not used: 5 of the image branch" in note
    for family in ("2 of vace_blocks", "2 of layers or parts that this model has not", "2 of diffusion_model.blocks.*"):
        assert family in note


@pytest.mark.parametrize(
    "tensors, message",
    [
        (low_rank("vace_blocks.0.self_attn.q"), "nothing fits this model (2 of 2 keys are foreign: diffusion_model.v"),
        ({"blocks.0.ffn.0.weight": noise(4)}, "not a LoRA"),
        (STATE, "not a LoRA; the file looks like a Wan i2v transformer"),
        (low_rank(Q, 80, 64), f"does not fit this model: {Q}.weight [80, 64] for [64, 64] (1 in all)"),
        ({f"{Q}.diff_b": noise(63)}, f"{Q}.bias [63] for [64]"),
        ({"blocks.0.diff_m": noise(1, 3, 64)}, "blocks.0.modulation [1, 3, 64] for [1, 6, 64]"),
        ({f"{Q}.lora_up.weight": noise(64, 4)}, f"{Q}.weight is incomplete (no down)"),
        (
            {f"{Q}.lora_up.weight": torch.tensor(1.0), f"{Q}.lora_down.weight": torch.tensor(1.0)},
            "do not go together: down [], up []",
        ),
        (low_rank(Q) | {f"diffusion_model.{Q}.alpha": noise(4)}, f"{Q}.weight has an alpha of shape [4], float32"),
        (low_rank(Q) | {f"{Q}.lokr_w1": noise(8, 8), f"{Q}.lokr_w2": noise(8, 8, seed=1)}, "has factors of two kinds"),
        (
            {f"{Q}.lora_up.weight": noise(64, 0), f"{Q}.lora_down.weight": noise(0, 64)},
            "has no numbers in down [0, 64]",
        ),
        ({f"{Q}.diff": noise(64, 64), f"{Q}.reshape_weight": torch.arange(99)}, "reshaped to what is no shape"),
        ({f"{Q}.dora_scale": noise(64)}, f"{Q}.weight is incomplete (no up)"),
        (low_rank(Q) | {f"diffusion_model.{Q}.dora_scale": noise(9)}, "has a magnitude of [9] for [64, 64]"),
        (
            {f"{Q}.lora_up.weight": noise(64, 4), f"{Q}.lora_down.weight": noise(8, 64)},
            "has factors that do not go together: down [8, 64], up [64, 4]",
        ),
        ({f"{Q}.diff": torch.zeros(64, 64, dtype=torch.int8)}, "is int8, not a float"),
        ({f"{Q}.{one}.weight": noise(4, 4) for one in ("a1", "a2", "b1", "b2")}, "holds GLoRA"),
        ({f"{Q}_loras.down.weight": noise(4, 4)}, "holds a Stand-In identity adapter"),
        (low_rank(Q) | {f"{Q}.lora_up.weight": noise(64, 4)}, "are the same part: it holds several adapters"),
    ],
)
def test_what_is_refused(lora, tensors, message):
    with pytest.raises(SwanError) as error:
        lora(tensors)
    assert message in str(error.value) and "\n" not in str(error.value) and "a.safetensors" in str(error.value)


def test_another_size_is_named(lora):
    shapes = {f"{Q}.weight": (1536, 1536)}
    with pytest.raises(SwanError, match="it was made for a 14B model, this is a 1.3B model"):
        lora(low_rank(Q, 5120, 5120), shapes)
