"""The transformer: equal to diffusers', and its own batching, timesteps and back ends."""

import sys

import pytest
import torch
from wan.cache import NoCache
from wan.distributed import Parallel

from wan.errors import SwanError, UsageError
from wan.models import attention
from wan.models.dit import CLIP_DIM, CLIP_TOKENS, WanModel
from wan.models.dit.sequence import Group, Schedule, Sequence, Times
from wan.models.ops import OPS
from wan.weights.assign import load_weights

SHAPE = {
    "in_dim": 6,
    "out_dim": 4,
    "dim": 48,
    "ffn_dim": 80,
    "freq_dim": 32,
    "text_dim": 24,
    "text_len": 12,
    "num_heads": 2,
    "num_layers": 2,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def make(model_type="t2v", **changes):
    torch.manual_seed(0)
    return WanModel(model_type, **(SHAPE | changes)).eval()


def latents(*sizes, channels=6):
    torch.manual_seed(1)
    return [torch.randn(channels, *size) for size in sizes]


def texts(*lengths):
    torch.manual_seed(2)
    return [torch.randn(length, SHAPE["text_dim"]) for length in lengths]


def close(actual, wanted, tolerance=1e-5):
    assert actual.shape == wanted.shape and actual.dtype == torch.float32
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


def same_weights(model_type, **changes):
    """Ours and diffusers' model with the weights of the latter."""
    pytest.importorskip("diffusers")
    from benchmarks.peers import build_ours, build_theirs
    from tests.unit.weight_helpers import DictSource

    config = SHAPE | {"model_type": model_type} | changes
    torch.manual_seed(0)
    theirs = build_theirs("dit", config)
    return load_weights(build_ours("dit", config), DictSource(theirs.state_dict()), "dit"), theirs


@pytest.mark.parametrize("changes", [{}, {"dim": 40, "num_heads": 2}, {"num_heads": 4, "num_layers": 1}])
def test_t2v_equals_diffusers(changes):
    ours, theirs = same_weights("t2v", **changes)
    x, context = torch.stack(latents((3, 4, 6), (3, 4, 6))), torch.stack(texts(12, 12))
    t = torch.tensor([999, 37])
    close(ours(x, t, context), theirs(x, t, context).sample, 1e-4)


def test_i2v_equals_diffusers():
    ours, theirs = same_weights("i2v", text_len=512)  # what diffusers' cross attention takes for granted
    [x, y], context = latents((2, 4, 4), (2, 4, 4), channels=3), torch.stack(texts(512))
    clip = torch.randn(1, CLIP_TOKENS, CLIP_DIM)
    t = torch.tensor([500])
    wanted = theirs(torch.cat([x, y])[None], t, context, encoder_hidden_states_image=clip).sample
    close(ours(x[None], t, context, y=y[None], clip_fea=clip), wanted, 1e-4)
    close(ours([x], t, context, y=[y], clip_fea=clip)[0][None], wanted, 1e-4)


def test_flf2v_equals_diffusers():
    ours, theirs = same_weights("flf2v", text_len=512)
    [x], context, t = latents((1, 4, 4)), torch.stack(texts(512)), torch.tensor([1])
    clip = torch.randn(2, CLIP_TOKENS, CLIP_DIM)
    wanted = theirs(x[None], t, context, encoder_hidden_states_image=clip).sample
    close(ours(x[None], t, context, clip_fea=clip), wanted, 1e-4)


VACE = {"num_layers": 3, "vace_layers": [0, 2], "vace_in_dim": 10}


def vace_inputs(*sizes, scale=0.7):
    contexts = [torch.randn(10, *size) for size in sizes]
    return {"vace_context": contexts, "vace_context_scale": scale}


def test_vace_equals_diffusers():
    ours, theirs = same_weights("vace", **VACE)
    x, context, t = latents((3, 4, 6)), texts(12), torch.tensor([321])
    inputs = vace_inputs((3, 4, 6))
    scales = torch.full((2,), inputs["vace_context_scale"])
    control = inputs["vace_context"][0][None]
    wanted = theirs(torch.stack(x), t, torch.stack(context), None, control, scales).sample
    close(ours(x, t, context, **inputs)[0][None], wanted, 1e-4)


def test_vace_takes_batches_and_lists():
    model, x, context, t = make("vace", **VACE), latents((3, 4, 6), (3, 4, 6)), texts(5, 12), torch.tensor([900, 20])
    inputs = vace_inputs((3, 4, 6), (3, 4, 6))
    batch = model(torch.stack(x), t, context, **inputs | {"vace_context": torch.stack(inputs["vace_context"])})
    for one, other in zip(batch, model(x, t, context, **inputs), strict=True):
        close(one, other)
    without = model(x, t, context, **inputs | {"vace_context_scale": 0.0})
    base = make(num_layers=3)
    base.load_state_dict({name: one for name, one in model.state_dict().items() if not name.startswith("vace_")})
    for one, other in zip(without, base(x, t, context), strict=True):
        assert torch.equal(one, other)


class InParts(NoCache):
    """Runs blocks as caches may: in part, again, and not all of them."""

    def __init__(self, *spans):
        self.spans = spans

    def blocks(self, ctx, h, run, count, embed=None):
        outs = [h]
        for first, last in self.spans:
            outs.append(run(outs[first], first, last) if first else run(h, first, last))
        return outs[-1]


@pytest.mark.parametrize("spans", [[(0, 1), (1, 3)], [(0, 3), (0, 3)], [(0, 1), (0, 3)]])
def test_hints_of_vace_follow_the_blocks_that_run(spans):
    model, [x], context, t = make("vace", **VACE), latents((3, 4, 6)), texts(5), torch.tensor([900])
    seen, inputs = [], {"vace_context": vace_inputs((3, 4, 6))["vace_context"][0][None], "vace_context_scale": 0.7}
    wanted = model(x[None], t, context, **inputs)
    for n, block in enumerate(model.vace_blocks):
        block.register_forward_hook(lambda *_, n=n: seen.append(n))
    assert torch.equal(model(x[None], t, context, cache=InParts(*spans), **inputs), wanted)
    del seen[:]
    model(x[None], t, context, cache=InParts((0, 1)), **inputs)
    assert seen == [0]  # and nothing is made that no block needs
    del seen[:]
    model(x[None], t, context, cache=InParts((0, 2)), **inputs)
    assert seen == [0]
    assert list(model.units()) == ["blocks.0", "vace_blocks.0", "blocks.1", "blocks.2", "vace_blocks.1"]


def test_a_timestep_a_token_equals_diffusers():
    ours, theirs = same_weights("ti2v")
    x, context = torch.stack(latents((3, 4, 6))), torch.stack(texts(12))
    t = torch.full((1, 18), 700)
    t[:, :6] = 0  # the first frame is given
    close(ours(x, t, context), theirs(x, t, context).sample, 1e-4)


def test_bf16_stays_close_to_fp32():
    model, x, context, t = make(), latents((3, 4, 6)), texts(9), torch.tensor([640])
    wanted = model(x, t, context)[0]
    for name, parameter in model.named_parameters():
        if not model.keep_fp32(name):
            parameter.data = parameter.data.bfloat16()
    actual = model(x, t, context)[0]
    assert actual.dtype == torch.float32
    assert (actual - wanted).norm() < 0.02 * wanted.norm()


def test_a_batch_equals_its_elements():
    model, x, context = make(), latents((3, 4, 6), (3, 4, 6)), texts(5, 12)
    t = torch.tensor([900, 20])
    batch = model(torch.stack(x), t, context)
    for i in range(2):
        close(batch[i : i + 1], model(x[i][None], t[i : i + 1], [context[i]]))
    shared = model(torch.stack(x), t[:1], context)  # one timestep for all
    close(shared[1:], model(x[1][None], t[:1], [context[1]]))


def test_a_list_may_mix_sizes_and_each_equals_itself_alone():
    model, x, context = make(), latents((1, 4, 6), (3, 2, 8)), texts(5, 12)
    t = torch.tensor([900, 20])
    together = model(x, t, context)
    assert [tuple(out.shape) for out in together] == [(4, 1, 4, 6), (4, 3, 2, 8)]
    for i in range(2):
        close(together[i], model([x[i]], t[i : i + 1], [context[i]])[0])


def test_one_timestep_a_token_equals_one_a_sample_where_all_agree():
    model, x, context = make("ti2v"), latents((2, 4, 4)), texts(7)
    wanted = model(x, torch.tensor([300]), context)[0]
    close(model(x, torch.full((1, 8), 300), context)[0], wanted)
    close(model(x, torch.cat([torch.full((1, 8), 300), torch.zeros(1, 5)], 1), context)[0], wanted)  # beyond: ignored


def test_a_token_of_time_zero_is_modulated_by_time_zero():
    model, x, context = make("ti2v", num_layers=0), latents((2, 4, 4)), texts(7)  # without blocks, tokens do not mix
    mixed = model(x, torch.tensor([[0] * 4 + [300] * 4]), context)[0]
    close(mixed[:, :1], model(x, torch.tensor([0]), context)[0][:, :1])
    close(mixed[:, 1:], model(x, torch.tensor([300]), context)[0][:, 1:])


@pytest.mark.parametrize(
    "t, rows, segments",
    [
        (torch.tensor([7]), 1, [(0, 4)]),
        (torch.tensor([7, 7]), 1, [(0, 8)]),
        (torch.tensor([9.5, 2.0]), 2, [(1, 4), (0, 4)]),
        (torch.tensor([[0, 800, 800, 800]]), 2, [(0, 1), (1, 3)]),
        (torch.tensor([[0, 800, 800, 800]] * 2), 2, [(0, 1), (1, 3), (0, 1), (1, 3)]),
        (torch.tensor([[5, 5, 5, 5, 0, 0]]), 1, [(0, 4)]),
    ],
)
def test_each_distinct_timestep_is_embedded_once(t, rows, segments):
    model, seen = make(), []
    model.time_embedding["0"].register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    sequence = Sequence(
        [Group((1, 2, 2))], Parallel(), model.attention, OPS["cpu"], model.head_dim, torch.device("cpu")
    )
    time_RC, temb_R6C, found = model.embed_time(Times.of(t), sequence, len(t))
    assert seen == [rows] and time_RC.shape[0] == temb_R6C.shape[0] == rows
    assert found == segments


def test_a_schedule_is_embedded_by_the_first_of_its_steps_and_changes_no_bit():
    model, [x], context, seen = make("ti2v"), latents((2, 4, 4)), texts(7), []
    steps = [torch.tensor([999]), torch.tensor([[0] * 4 + [500.0] * 4]), torch.tensor([2.5])]
    alone = [model(x[None], t, context) for t in steps]
    model.time_embedding["0"].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    for times, wanted in zip(Schedule(steps), alone, strict=True):
        for _ in ("cond", "uncond"):
            assert torch.equal(model(x[None], times, context), wanted)
        assert seen == [1, 2, 1]


def sequence_of(*groups):
    model = make()
    return Sequence(groups, Parallel(), model.attention, OPS["cpu"], model.head_dim, torch.device("cpu"))


def test_groups_of_tokens_have_places_and_times_of_their_own_and_may_be_unseen():
    whole, video = sequence_of(Group((3, 2, 2))), Group((2, 2, 2), origin=(1, 0, 0))
    parts = sequence_of(video, Group((1, 2, 2), time=0.0, is_seen=False))
    assert torch.equal(parts.rope_LD, torch.cat([whole.rope_LD[4:], whole.rope_LD[:4]]))
    before = sequence_of(Group((1, 1, 1), origin=(-5, 0, 0)))
    assert torch.allclose(before.rope_LD, sequence_of(Group((1, 1, 1), origin=(5, 0, 0))).rope_LD.conj())
    assert parts.segments(torch.tensor([700.0]), 2) == ((0.0, 700.0), [(1, 8), (0, 4)] * 2)
    assert parts.segments(torch.tensor([[9.0] * 8]), 1) == ((0.0, 9.0), [(1, 8), (0, 4)])
    with pytest.raises(ValueError, match="7 timesteps for 8 tokens"):
        parts.segments(torch.zeros(1, 7), 1)
    x_BLC = torch.randn(2, 12, 3)
    assert torch.equal(parts.gather(x_BLC), x_BLC[:, :8])


def test_padding_of_the_text_is_zeros():
    model, x, [text] = make(), latents((1, 4, 4)), texts(5)
    padded = torch.cat([text, torch.zeros(7, SHAPE["text_dim"])])
    t = torch.tensor([10])
    assert torch.equal(model(x, t, [text])[0], model(x, t, [padded])[0])


def test_what_forms_the_modulation_stays_in_fp32():
    kept = {name.split(".")[0] for name, _ in make().named_parameters() if WanModel.keep_fp32(name)}
    assert kept == {"time_embedding", "time_projection", "blocks", "head"}
    assert not WanModel.keep_fp32("blocks.0.ffn.0.weight") and WanModel.keep_fp32("blocks.0.modulation")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"context": texts(13)}, "13 tokens; at most 12"),
        ({"context": texts(3, 3)}, "2 texts for a batch of 1"),
        ({"t": torch.zeros(1, 5)}, "5 timesteps for 8 tokens"),
        ({"x": torch.zeros(1, 6, 2, 4, 5)}, "cannot be cut into patches"),
        ({"clip_fea": torch.zeros(1, CLIP_TOKENS, CLIP_DIM)}, "no image branch"),
        ({"vace_context": torch.zeros(1, 10, 2, 4, 4)}, "vace_context is given, but this model has no use for it"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    fitting = {"x": torch.zeros(1, 6, 2, 4, 4), "t": torch.tensor([500]), "context": texts(3)}
    with pytest.raises(ValueError, match=message):
        make()(**(fitting | change))


def test_inputs_of_vace_that_do_not_fit_are_refused():
    model, [x], context, t = make("vace", **VACE), latents((3, 4, 6)), texts(5), torch.tensor([900])
    with pytest.raises(ValueError, match="vace_context is missing"):
        model(x[None], t, context, vace_context_scale=1.0)
    with pytest.raises(ValueError, match=r"vace_context is \[1, 10, 3, 4, 4\]; these latents need \[1, 10, 3, 4, 6\]"):
        model(x[None], t, context, vace_context=torch.zeros(1, 10, 3, 4, 4), vace_context_scale=1.0)


def test_unknown_back_end_lists_the_known():
    with pytest.raises(UsageError) as error:
        make(attention="warp")
    assert all(name in str(error.value) for name in ("warp", *attention.BACK_ENDS))


@pytest.mark.parametrize("name", ["flash_attn2", "flash_attn3", "sage_attn2"])
def test_missing_back_end_lists_what_is_here(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as error:
        attention.get_attention(name)
    assert attention.BACK_ENDS[name].package in str(error.value) and str(error.value).endswith("available here: sdpa")


def test_a_back_end_is_there_once_its_package_and_a_gpu_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name == "sageattention" or None)
    assert attention.available() == ["sdpa", "sage_attn2"]
    assert attention.get_attention("sage_attn2") is attention.BACK_ENDS["sage_attn2"]


@pytest.mark.parametrize(
    "name, package, version, is_there",
    [
        ("sage_attn2", "sageattention", "1.0.6", False),
        ("sage_attn2", "sageattention", "2.2.0+cu128", True),
        ("flash_attn2", "flash_attn", "1.0.9", False),
        ("flash_attn2", "flash_attn", "2.7.4.post1", True),
        ("flash_attn2", "flash_attn", "0+unknown", False),
    ],
)
def test_only_a_version_that_has_what_is_called_is_taken(monkeypatch, tmp_path, name, package, version, is_there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    info = tmp_path / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert (name in attention.available()) == is_there
    if not is_there:
        with pytest.raises(UsageError, match=rf"needs the package {package} \(version 2 or later\) and a CUDA device"):
            attention.get_attention(name)


def test_a_package_that_does_not_work_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    """As one that was built for another torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(
        SwanError, match=r"^the package flash_attn cannot be used: undefined symbol: _ZN3c10 more; inst"
    ):
        attention.check_attention("flash_attn2", "cuda")
    with pytest.raises(UsageError, match="needs a CUDA device, not cpu"):
        attention.check_attention("flash_attn2", "cpu")


@pytest.mark.parametrize("name", ["flash_attn2", "flash_attn3", "sage_attn2"])
def test_kernels_of_16_bits_leave_fp32_to_sdpa(monkeypatch, name):
    monkeypatch.setattr(attention.BackEnd, "is_installed", lambda self: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    q, one, sdpa = torch.randn(1, 2, 3, 8), attention.get_attention(name), attention.get_attention("sdpa")
    assert torch.equal(one(q, q, q), sdpa(q, q, q))
    assert all(torch.equal(*pair) for pair in zip(one.with_lse(q, q, q), sdpa.with_lse(q, q, q)))


def test_sdpa_is_softmax_attention():
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / 8**0.5).softmax(-1)
    close(attention.get_attention("sdpa")(q, k, v), torch.einsum("bhlm,bmhd->blhd", weights, v))
    out, lse = attention.get_attention("sdpa").with_lse(q, k, v)
    close(out, torch.einsum("bhlm,bmhd->blhd", weights, v))
    close(lse, (torch.einsum("blhd,bmhd->blhm", q, k) / 8**0.5).logsumexp(-1))
