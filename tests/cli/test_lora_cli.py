"""LoRAs through the command line and the pipeline, on the embedded models and little ones of two experts."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.cli import main
from wan.errors import SwanError, UsageError
from wan.media import read_image
from wan.models.dit import WanModel
from wan.options import build_request
from wan.options.replay import replay_options
from wan.pipeline import WanPipeline
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

QUICK = ("--sample_steps", 2, "--frame_num", 1, "--seed", 0)


def write(path, dim, seed=0, prefix="diffusion_model.", size=0.3):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in ("blocks.0.self_attn.q", "blocks.1.cross_attn.o"):
        tensors[f"{prefix}{module}.lora_up.weight"] = torch.randn(dim, 4, generator=generator) * size
        tensors[f"{prefix}{module}.lora_down.weight"] = torch.randn(4, dim, generator=generator) * size
    tensors[f"{prefix}blocks.0.self_attn.q.diff_b"] = torch.randn(dim, generator=generator) * size
    save_file(tensors, path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.safetensors", 192)
    write(tmp_path / "b.safetensors", 192, seed=1)
    write(tmp_path / "wide.safetensors", 5120)
    (tmp_path / "notes.safetensors").write_text("nothing of the kind")
    save_file({"blocks.0.ffn.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    return tmp_path


@pytest.fixture
def generate(capsys, folder):
    def of(*args, quick=QUICK):
        capsys.readouterr()
        code = main([*map(str, quick), *map(str, args)])
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 else None, err

    return of


def test_video_replay_and_strengths(generate):
    def sha256(*args):
        code, report, err = generate(*args)
        assert code == 0, err
        return report["sha256"]

    bare = sha256("--save_file", "bare.png")
    once = sha256("--lora", "a.safetensors", "--save_file", "once.png")
    assert once != bare
    assert sha256("--lora", "a.safetensors:1.0", "--save_file", "same.png") == once
    assert sha256("--lora", "a.safetensors:0", "--save_file", "none.png") == bare
    two = sha256("--lora", "a.safetensors:0.5", "--lora", "b.safetensors:-1", "--save_file", "two.png")
    assert two not in (once, bare)
    code, report, _ = generate("--replay", "two.png", "--replay_files", "--save_file", "again.png", quick=())
    assert report["sha256"] == two
    code, report, _ = generate("--replay", "two.png", "--lora", "a.safetensors", "--save_file", "c.png", quick=())
    assert report["sha256"] == once


def test_packed_and_dense_weights_agree(generate, folder):
    file = embedded_checkpoint(load_task("t2v-tiny")) / "diffusion_pytorch_model.safetensors"
    export_gguf(open_source(file), folder / "dit.gguf", "Q8_0")
    pixels = {}
    for mode in ("stream", "resident"):
        name = f"{mode}.png"
        flags = ("--gguf", "dit.gguf", "--gguf_mode", mode, "--lora", "a.safetensors", "--save_file", name)
        assert generate(*flags)[0] == 0
        pixels[mode] = torch.from_numpy(read_image(name).copy()).int()
    assert (pixels["stream"] - pixels["resident"]).abs().max() <= 1


def test_keys_without_a_place_are_told(generate, folder):
    save_file(
        {"blocks.0.self_attn.q.diff_b": torch.ones(192), "blocks.0.cross_attn.k_img.diff_b": torch.ones(192)}, "i.st"
    )
    code, _, err = generate("--lora", "i.st", "--save_file", "a.png")
    assert code == 0
    assert f"warning: {folder / 'i.st'}: 1 of 2 keys are not used: 1 of the image branch\n" in err


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--lora", "no.safetensors"], 2, "--lora: no file no.safetensors"),
        (["--lora", "no.safetensors:0.5"], 2, "--lora: no file no.safetensors\n"),
        (["--lora", "a.safetensors:strong"], 2, "--lora a.safetensors: the strength must be a number, not 'strong'"),
        (["--lora", "a.safetensors:nan"], 2, "the strength must be a number, not 'nan'"),
        (["--lora", "a.safetensors:"], 2, "the strength must be a number, not ''"),
        (
            ["--lora_high", "a.safetensors"],
            2,
            "--lora_high is for tasks with two experts; t2v-tiny has one: use --lora",
        ),
        (["--lora_low", "a.safetensors"], 2, "--lora_low is for tasks with two experts"),
        (["--lora"], 2, "--lora: expected one argument"),
        (["--lora", "wide.safetensors"], 1, "blocks.0.self_attn.q.weight [5120, 5120] for [192, 192]"),
        (["--lora", "other.safetensors"], 1, "other.safetensors: not a LoRA"),
        (["--lora", "notes.safetensors"], 1, "not a safetensors file"),
        (["--lora", "a.safetensors", "--lora", "wide.safetensors"], 1, "wide.safetensors: a LoRA that does not fit"),
    ],
)
def test_wrong_loras_are_one_line_before_anything_is_loaded(generate, monkeypatch, flags, code, message):
    monkeypatch.setattr(WanPipeline, "__call__", lambda *args, **kwargs: pytest.fail("it was run"))
    found, _, err = generate("--quiet", "--save_file", "a.png", *flags)
    assert found == code and message in err and err.count("\n") == 1


def test_a_path_may_hold_colons(folder):
    write(folder / "a:0.5", 192)
    write(folder / "a", 192)

    def chosen(*values):
        [found] = build_request({"lora": list(values)}).sample.loras.values()
        return [(path.rpartition("/")[2], strength) for path, strength in found]

    assert chosen("a:0.5", "a:0.5:0.25", "a:2", "a", ("a", 3), ["a:0.5", 1]) == [
        *[("a:0.5", 1.0), ("a:0.5", 0.25), ("a", 2.0), ("a", 1.0), ("a", 3.0), ("a:0.5", 1.0)]
    ]


def test_settings_hold_them(folder):
    first = build_request({"lora": ["a.safetensors:0.5", "b.safetensors"], "save_file": "a.mp4", "seed": 1})
    stored = json.loads(json.dumps(first.settings()))
    assert stored["lora"] == [[str(folder / "a.safetensors"), 0.5], [str(folder / "b.safetensors"), 1.0]]
    assert build_request(replay_options(stored, {"save_file": "a.mp4"}, files=True)) == first
    assert not {"lora", "lora_high", "lora_low"} & build_request({}).settings().keys()


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    spec = shrunk("t2v-A14B")
    return spec, write_checkpoint(tmp_path_factory.mktemp("experts"), spec)


@pytest.fixture
def setup(experts, folder, monkeypatch):
    """setup(options) -> (request, spec) of a little model of two experts, with LoRAs `one` and `two` for it."""
    spec, checkpoint = experts
    monkeypatch.setattr("wan.options.load_task", lambda name: spec)
    write(folder / "one", 48)
    write(folder / "two", 48, seed=1)

    def of(**options):
        run = {"task": spec.name, "ckpt_dir": str(checkpoint), "prompt": "a", "size": "32*32", "frame_num": 1}
        return build_request(run | {"sample_steps": 4, "seed": 0, "dtype": "fp32", "device": "cpu"} | options), spec

    return of


def test_two_experts_have_their_own(setup):
    request, spec = setup(lora="one:0.5", lora_high=["two"], offload_model=False)
    pipe = WanPipeline.from_request(request, spec)

    def held(name):
        return [(lora.path.rpartition("/")[2], strength) for lora, strength in pipe.loras[name]]

    assert held("high") == [("one", 0.5), ("two", 1.0)] and held("low") == [("one", 0.5)]
    pipe(request)
    high, low = (pipe.experts[name].blocks[0].self_attn.q for name in ("high", "low"))
    bare = WanPipeline.from_request(*setup(offload_model=False))
    for name, layer in (("high", high), ("low", low)):
        wanted = bare.experts[name].blocks[0].self_attn.q.weight
        for lora, strength in pipe.loras[name]:
            up, down = (lora.updates["blocks.0.self_attn.q.weight"][0]._read(one, "cpu") for one in ("up", "down"))
            wanted = wanted + strength * up @ down
        torch.testing.assert_close(layer.weight, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offload", [True, False])
def test_changed_at_run_time_as_made_with_them(setup, offload, monkeypatch):
    """Loaded models are changed in place, others when they are loaded; without LoRAs all is as at first."""
    choices = [{}, {"lora": "one"}, {"lora": "one:0.3", "lora_low": ["two"]}, {"lora_high": ("two", -1)}, {}]
    pipe = WanPipeline.from_request(*setup(offload_model=offload))
    bare = pipe(setup()[0]).latents
    made = []
    monkeypatch.setattr(WanModel, "__init__", _counted(WanModel.__init__, made))
    for choice in choices:
        pipe.set_loras(**choice)
        made.clear()
        latents = pipe(setup()[0]).latents
        assert len(made) == (2 if offload else 0)
        wanted = WanPipeline.from_request(*setup(**choice))(setup()[0]).latents
        assert torch.equal(latents, wanted) and torch.equal(latents, bare) == (not choice)


def _counted(init, calls):
    def counting(self, *args, **kwargs):
        calls.append(self)
        init(self, *args, **kwargs)

    return counting


def test_what_does_not_fit_changes_nothing(setup, folder):
    pipe = WanPipeline.from_request(*setup(lora="one"))
    before = pipe.loras
    write(folder / "wide", 64)
    for choice, kind in (({"lora": "wide"}, SwanError), ({"lora": "no"}, UsageError)):
        with pytest.raises(kind):
            pipe.set_loras(**choice)
    assert pipe.loras is before


def test_a_change_that_fails_half_way_leaves_no_mixture(setup, folder):
    pipe = WanPipeline.from_request(*setup(offload_model=False))
    pipe(setup()[0])
    pipe.set_loras("one")
    wanted = pipe(setup()[0]).latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan.weights.lora._merge", lambda *args: (_ for _ in ()).throw(SwanError("the file ended")))
        with pytest.raises(SwanError, match="ended"):
            pipe.set_loras("two")
    two = pipe(setup()[0]).latents
    assert torch.equal(two, WanPipeline.from_request(*setup(lora="two"))(setup()[0]).latents)
    assert not torch.equal(two, wanted)
