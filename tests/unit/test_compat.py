"""The entry points of other projects: diffusers' own pipelines with our transformer, state dicts, configs, samplers."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import yaml

from benchmarks.peers import build_theirs
from tests.unit.tiny_checkpoint import shrunk, write_checkpoint
from wan.compat import create_wan_transformer_gguf, load_gguf_pipeline, load_gguf_transformer
from wan.compat.config import hyperparameters, read_fun_config
from wan.compat.sampler import sampler, solver_of
from wan.compat.transformer import WanTransformer, WanTransformerGGUF
from wan.errors import SwanError, UsageError
from wan.options import build_request
from wan.pipeline import WanPipeline
from wan.tasks import load_task
from wan.weights.names import official_names
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "wan" / "assets" / "tiny"
SHAPE = {"in_dim": 16, "out_dim": 16, "dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2}
SHAPE |= {"freq_dim": 32, "text_dim": 32, "text_len": 512}
HEADS = {"num_heads": 2}
PROMPT = "a red circle moving right on a black background"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """pair(model_type, seed) -> (GGUF file of Q8_0 weights, diffusers' model of the same weights)."""
    made = {}

    def make(model_type="t2v", seed=0, **shape):
        key = (model_type, seed, *shape.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("pair")
            torch.manual_seed(seed)
            theirs = build_theirs("dit", SHAPE | {"model_type": model_type} | shape)
            theirs.save_pretrained(folder)
            path = folder / "dit.gguf"
            export_gguf(open_source(folder / "diffusion_pytorch_model.safetensors"), path, "Q8_0")
            source, state = open_source(path), theirs.state_dict()
            for ours, name in official_names(state, "dit").items():
                state[name].copy_(source.read(ours).reshape(state[name].shape))
            made[key] = path, theirs
        return made[key]

    return make


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    export_gguf(open_source(TINY / "diffusion_pytorch_model.safetensors"), path, "Q8_0")
    return path


def load(path, **options):
    return load_gguf_transformer(path, HEADS, dtype=torch.float32, **options)


# diffusers


def latents(pipeline, transformer, second=None, height=32, width=48, **call):
    """What a pipeline of diffusers makes with a transformer of ours or of its own."""
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    options = call.pop("options", {})
    parts = {"transformer": transformer, "transformer_2": second, "text_encoder": None, "tokenizer": None}
    parts |= {"vae": None, "scheduler": diffusers.UniPCMultistepScheduler(**flow)} | options
    pipe = getattr(diffusers, pipeline)(**parts).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(5)
    texts = torch.randn(2, 1, 512, SHAPE["text_dim"], generator=random)
    return pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        height=height,
        width=width,
        num_frames=5,
        num_inference_steps=4,
        generator=random,
        output_type="latent",
        **call,
    ).frames


@pytest.mark.parametrize("stream", [True, False])
def test_text_to_video_in_diffusers(pair, stream):
    path, theirs = pair()
    ours = load(path, stream=stream)
    torch.testing.assert_close(latents("WanPipeline", ours), latents("WanPipeline", theirs), rtol=0, atol=1e-4)


def test_two_experts_in_diffusers(pair):
    (high, their_high), (low, their_low) = pair(), pair(seed=1)
    options = {"boundary_ratio": 0.875}
    ours = latents("WanPipeline", load(high), load(low), options=options, guidance_scale_2=3.0)
    theirs = latents("WanPipeline", their_high, their_low, options=options, guidance_scale_2=3.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, latents("WanPipeline", load(high)), atol=1e-2)


def test_a_timestep_a_token_in_diffusers(pair):
    path, theirs = pair("ti2v", in_dim=48, out_dim=48)
    options = {"expand_timesteps": True}
    ours = latents("WanPipeline", load(path), options=options)
    torch.testing.assert_close(ours, latents("WanPipeline", theirs, options=options), rtol=0, atol=1e-4)


class Eyes(torch.nn.Module):
    """In place of the CLIP encoder."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, pixel_values, **_):
        tokens = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(7))
        return SimpleNamespace(hidden_states=[tokens, tokens])


class Lens:
    def __call__(self, **_):
        from transformers import BatchFeature

        return BatchFeature({"pixel_values": torch.zeros(1, 3, 224, 224)})


def test_image_to_video_in_diffusers(pair):
    import diffusers
    from PIL import Image

    path, theirs = pair("i2v", in_dim=36)
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    options = {"vae": vae, "image_processor": Lens(), "image_encoder": Eyes()}
    ours = latents("WanImageToVideoPipeline", load(path), options=options, image=image)
    theirs = latents("WanImageToVideoPipeline", theirs, options=options, image=image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_saved_pipelines_of_diffusers(pair, tmp_path):
    """The way that the docstring shows: from_pretrained itself takes only models of diffusers."""
    import diffusers

    path, theirs = pair()
    diffusers.WanPipeline(None, None, None, diffusers.UniPCMultistepScheduler(), theirs).save_pretrained(tmp_path)
    missing = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path, transformer=None, **missing)
    assert pipe.transformer is None
    pipe.transformer = load(path)
    assert isinstance(pipe.components["transformer"], WanTransformer)


def test_offloading_in_diffusers(pair):
    import diffusers

    model = load(pair()[0])
    pipe = diffusers.WanPipeline(None, None, None, diffusers.UniPCMultistepScheduler(), transformer=model)
    pipe.enable_model_cpu_offload(device="cpu")
    x, t, texts = inputs()
    assert model(x, t, texts).sample.shape == x.shape
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(SwanError, match="enable_model_cpu_offload"):
        model(x, t, texts)


# The transformer


def inputs():
    random = torch.Generator().manual_seed(2)
    return torch.randn(2, 16, 2, 4, 4, generator=random), torch.tensor([700, 700]), torch.randn(2, 7, 32)


def test_it_answers_by_both_conventions(pair):
    model = load(pair()[0])
    x, t, texts = inputs()
    out = model(hidden_states=x, timestep=t, encoder_hidden_states=texts)
    (as_tuple,) = model(x, t, texts, return_dict=False)
    official = model(x=x, t=t, context=list(texts), seq_len=8)
    assert torch.equal(out.sample, out[0]) and torch.equal(out["sample"], as_tuple)
    assert torch.equal(official, out.sample) and official.dtype == torch.float32
    assert torch.equal(model.model(x, t, texts), official)
    with pytest.raises(TypeError, match="seq_len"):
        model(x, t, texts, seq_len=8)
    with pytest.raises(TypeError, match="context"):
        model(x=x, t=t)


def test_what_pipelines_read(pair):
    model = load(pair("i2v", in_dim=36)[0])
    config = model.config
    assert config.in_channels == config["in_dim"] == 36 and config.out_channels == 16
    assert tuple(config.patch_size) == (1, 2, 2) and config.image_dim == 1280
    assert (config.num_attention_heads, config.attention_head_dim, config.num_layers) == (2, 32, 2)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    with model.cache_context("cond", step_index=0, sigma=1.0):
        pass
    assert load(pair()[0]).config.image_dim is None


def test_casts_keep_what_forms_the_modulation(pair):
    model = load(pair()[0])
    before = model.model.time_embedding["0"].weight.clone()
    assert model.to(torch.bfloat16) is model and model.dtype == torch.bfloat16
    assert torch.equal(model.model.time_embedding["0"].weight, before)
    assert model.model.blocks[0].ffn["0"].blocks.dtype == torch.uint8
    x, t, texts = inputs()
    assert torch.equal(model(x, t, texts).sample, load(pair()[0]).bfloat16()(x, t, texts).sample)


def test_autocast_changes_nothing(pair):
    model = load(pair()[0])
    x, t, texts = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(x, t, texts).sample
    assert torch.equal(inside, model(x, t, texts).sample)


def test_settings_without_effect_are_named(pair):
    with pytest.warns(UserWarning, match="dequant_dtype"):
        load(pair()[0], dequant_dtype=torch.float16)
    with pytest.warns(UserWarning, match="patch_dtype"):
        load(pair()[0], patch_dtype=torch.float16)


def test_a_config_that_does_not_fit_the_file(pair):
    path, _ = pair()
    with pytest.raises(SwanError, match=r"missing \(blocks\.2\."):
        load_gguf_transformer(path, {**HEADS, "num_layers": 3})
    with pytest.raises(SwanError, match=r"mis-shaped \(blocks\.0\.ffn\.0\.bias"):
        load_gguf_transformer(path, {**HEADS, "ffn_dim": 256})
    with pytest.raises(UsageError, match="64 cannot be divided among 3 heads"):
        load_gguf_transformer(path, {"num_heads": 3})
    for options, message in [({"dtype": "bf16"}, "dtype must be"), ({"device": "nowhere"}, "device nowhere cannot")]:
        with pytest.raises(UsageError, match=message):
            load_gguf_transformer(path, HEADS, **options)


# State dicts


class GGMLTensor(torch.Tensor):
    """Bytes that give out the shape of the weights, as ComfyUI-GGUF and gguf_loader hold them."""

    tensor_type: gguf.GGMLQuantizationType
    tensor_shape: torch.Size

    @property
    def shape(self):
        return self.tensor_shape


def ggml_tensor(entry):
    data = torch.from_numpy(entry.data.copy()).as_subclass(GGMLTensor)
    data.tensor_type, data.tensor_shape = entry.tensor_type, torch.Size(int(n) for n in reversed(entry.shape))
    return data


def gguf_parameter(entry):
    from diffusers.quantizers.gguf.utils import GGUFParameter

    if entry.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return torch.from_numpy(entry.data.copy())  # as diffusers' loader does
    return GGUFParameter(torch.from_numpy(entry.data.copy()), quant_type=entry.tensor_type)


@pytest.mark.parametrize("form", [lambda entry: entry, ggml_tensor, gguf_parameter])
def test_quantised_state_dicts(pair, form):
    path, _ = pair()
    state = {entry.name: form(entry) for entry in gguf.GGUFReader(path).tensors}
    model = create_wan_transformer_gguf({**SHAPE, "model_type": "t2v"}, state, dtype=torch.float32)
    assert type(model) is WanTransformerGGUF
    assert type(model.model.blocks[1].ffn["2"]).__name__ == "QuantLinear"
    x, t, texts = inputs()
    assert torch.equal(model(x, t, list(texts), 8), load(path)(x, t, texts).sample)


def test_plain_state_dict(pair):
    path, theirs = pair()
    config = dict(theirs.config)  # names of diffusers, in config and tensors
    model = create_wan_transformer_gguf(config, theirs.state_dict(), dtype=torch.float32)
    x, t, texts = inputs()
    torch.testing.assert_close(model([*x], t, texts), load(path)(x, t, texts).sample)


def test_bad_state_dicts(pair):
    source = open_source(pair()[0])
    state = {name: source.read(name) for name in source.keys()}
    config = SHAPE | {"in_channels": 16, "window_size": (-1, -1), "qk_norm": True}

    def problem(**changes):
        changed = {name: value for name, value in (state | changes).items() if value is not None}
        with pytest.raises(SwanError) as error:
            create_wan_transformer_gguf(config, changed)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "1 missing (patch_embedding.weight)" in problem(**{"patch_embedding.weight": None})
    assert "1 unexpected (extra.weight)" in problem(**{"extra.weight": torch.zeros(2, 2)})
    assert "mis-shaped (blocks.1.ffn.2.bias [3] for [64])" in problem(**{"blocks.1.ffn.2.bias": torch.zeros(3)})
    assert "head.head.bias is no tensor but a list" in problem(**{"head.head.bias": [1.0]})
    short = SimpleNamespace(data=np.zeros(5, np.uint8), tensor_type=8, shape=[64])
    assert "Q8_0 [64] needs 68 bytes, has 5" in problem(**{"head.head.bias": short})
    odd = SimpleNamespace(data=np.zeros(5, np.uint8), tensor_type=8, shape=[5])
    assert "no whole number of Q8_0 blocks" in problem(**{"head.head.bias": odd})
    strange = SimpleNamespace(data=np.zeros(5, np.uint8), tensor_type=99, shape=[5])
    assert "unknown tensor type 99" in problem(**{"head.head.bias": strange})
    with pytest.raises(UsageError, match="must map names"):
        create_wan_transformer_gguf(config, [])


# Configs


def test_hyperparameters_of_other_projects(tmp_path):
    theirs = {"in_channels": 16, "num_attention_heads": 12, "attention_head_dim": 128, "image_dim": None}
    theirs |= {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm_across_heads", "eps": "1e-06"}
    assert hyperparameters(theirs) == {"in_dim": 16, "num_heads": 12, "dim": 1536, "eps": 1e-6}
    assert hyperparameters({"hidden_size": 7, "dim": 8, "dict_mapping": {"in_dim": "in_channels"}}) == {"dim": 8}
    (tmp_path / "config.json").write_text(json.dumps({"dim": 5120}))
    assert hyperparameters(tmp_path / "config.json") == {"dim": 5120}


@pytest.mark.parametrize(
    "config, message",
    [
        ({"dimm": 8}, "unknown hyperparameter dimm"),
        ({"dim": "8"}, "dim must be a whole number above 0, not '8'"),
        ({"window_size": (3, 3)}, "window_size .* is not supported"),
        ({"model_type": "s3v"}, "model_type must be one of"),
        ({"patch_size": 2}, "patch_size must be three"),
        ({"eps": "small"}, "eps must be a number"),
    ],
)
def test_bad_hyperparameters(config, message):
    with pytest.raises(UsageError, match=message):
        hyperparameters(config)


def fun_config(path, **sections):
    """A YAML file with the keys of VideoX-Fun's config/wan2.1/wan_civitai.yaml."""
    data = {
        "format": "civitai",
        "pipeline": "Wan",
        "transformer_additional_kwargs": {"transformer_subpath": "./", "dict_mapping": {"in_dim": "in_channels"}},
        "vae_kwargs": {"temporal_compression_ratio": 4, "spatial_compression_ratio": 8},
        "text_encoder_kwargs": {"text_length": 512, "vocab": 256384, "shared_pos": False, "dropout": 0.0},
        "scheduler_kwargs": {"scheduler_subpath": None, "num_train_timesteps": 1000, "shift": 5.0, "base_shift": 0.5},
        "image_encoder_kwargs": None,
    }
    for section, values in sections.items():
        data[section] = values if not isinstance(data.get(section), dict) else data[section] | values
    path.write_text(yaml.safe_dump(data))
    return path


def test_fun_config(tmp_path):
    config = read_fun_config(fun_config(tmp_path / "a.yaml", vae_kwargs={"vae_subpath": "b.pth"}))
    assert config.shift == 5.0 and config.files == {"vae": "b.pth"} and config.stride == (4, 8)
    assert config.warnings == () and config.dit == {} and config.boundary is None
    odd = read_fun_config(fun_config(tmp_path / "a.yaml", vae_kwargs={"scale": 2}, lora_kwargs={}))
    assert [line.rpartition(": ")[2] for line in odd.warnings] == [
        "lora_kwargs has no effect",
        "vae_kwargs.scale has no effect",
    ]
    (tmp_path / "empty.yaml").write_text("")
    assert read_fun_config(tmp_path / "empty.yaml").files == read_fun_config(None).files == {}


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"scheduler_kwargs": {"shift": "five"}}, "scheduler_kwargs.shift must be a number above 0"),
        ({"scheduler_kwargs": {"use_dynamic_shifting": True}}, "use_dynamic_shifting must be False"),
        ({"text_encoder_kwargs": {"shared_pos": True}}, "shared_pos must be False"),
        ({"vae_kwargs": {"vae_subpath": 3}}, "vae_kwargs.vae_subpath must be a path"),
        ({"transformer_additional_kwargs": {"add_ref_conv": True}}, "unknown hyperparameter add_ref_conv"),
        ({"image_encoder_kwargs": "clip"}, "image_encoder_kwargs must be a table"),
    ],
)
def test_bad_fun_config(tmp_path, sections, message):
    with pytest.raises(SwanError, match=message):
        read_fun_config(fun_config(tmp_path / "a.yaml", **sections))


def test_no_yaml(tmp_path):
    with pytest.raises(UsageError, match="no config file"):
        read_fun_config(tmp_path / "absent.yaml")
    for text in ("a: [", "- list"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(SwanError, match="a.yaml: "):
            read_fun_config(tmp_path / "a.yaml")


# Samplers


def scheduler(name, **config):
    return type(name, (), {"config": config})()


def test_samplers_and_schedulers():
    assert sampler("Flow") == ("euler", None) and sampler("Flow_DPM++") == ("dpm++", None)
    assert sampler("Euler A")[0] == "unipc" and "Euler A" in sampler("Euler A")[1]
    assert solver_of(scheduler("FlowUniPCMultistepScheduler", shift=1, num_train_timesteps=1000)) == ("unipc", None)
    assert solver_of(scheduler("FlowDPMSolverMultistepScheduler", shift=4.0, solver_order=2)) == ("dpm++", 4.0)
    assert solver_of(scheduler("FlowMatchEulerDiscreteScheduler", shift=1.0)) == ("euler", 1.0)
    with pytest.raises(UsageError, match="unknown scheduler DDIMScheduler"):
        solver_of(scheduler("DDIMScheduler"))
    with pytest.raises(UsageError, match="solver_order 3"):
        solver_of(scheduler("FlowUniPCMultistepScheduler", solver_order=3))


def test_schedulers_of_diffusers():
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    assert solver_of(diffusers.UniPCMultistepScheduler(**flow)) == ("unipc", 3.0)
    assert solver_of(diffusers.DPMSolverMultistepScheduler(**flow)) == ("dpm++", 3.0)
    assert solver_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)) == ("euler", 5.0)
    with pytest.raises(UsageError, match="prediction_type 'epsilon'"):
        solver_of(diffusers.UniPCMultistepScheduler())


# The pipeline


CALL = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 3.0}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_pipeline_makes_the_frames_of_generate(tiny_gguf, tmp_path):
    pipe = load_gguf_pipeline(tiny_gguf, TINY, fun_config(tmp_path / "a.yaml"), dtype=torch.float32, device="cpu")
    videos = pipe(PROMPT, generator=seeded(3), **CALL).videos
    assert videos.shape == (1, 3, 9, 64, 64) and videos.dtype == torch.float32
    options = {"dit": str(tiny_gguf), "size": "64*64", "frame_num": 9, "sample_steps": 3, "sample_guide_scale": 3}
    options |= {"sample_shift": 5.0, "seed": 3, "prompt": PROMPT, "negative_prompt": "", "device": "cpu"}
    request = build_request({**options, "save_file": str(tmp_path / "a.mp4")})
    frames = WanPipeline.from_request(request, load_task("t2v-tiny"))(request).frames
    ours = (videos[0].permute(1, 2, 3, 0).double() * 255).floor().numpy()
    assert np.abs(ours - frames).max() <= 1 and (ours == frames).mean() > 0.999


def test_parts_can_be_moved_and_replaced(tiny_gguf):
    pipe = load_gguf_pipeline(tiny_gguf, TINY, dtype=torch.float32, device="cpu", gguf_mode="stream")
    assert pipe.transformer.config.in_channels == 16 and pipe.transformer is pipe.transformer
    pipe.transformer = pipe.transformer.to("cpu")
    pipe.text_encoder = pipe.text_encoder.to("cpu")
    pipe.vae = pipe.vae.to("cpu")
    assert pipe.tokenizer is pipe.text_encoder.tokenizer
    assert pipe.to("cpu", torch.float32) is pipe
    latents = pipe(prompt=[PROMPT], generator=seeded(3), output_type="latent", **CALL).videos
    assert latents.shape == (1, 16, 3, 8, 8)
    videos = pipe.decode_latents(latents)
    assert isinstance(videos, np.ndarray) and videos.shape == (1, 3, 9, 64, 64)
    out = pipe(PROMPT, generator=seeded(3), **CALL)
    assert np.array_equal(out.videos.numpy(), videos) and out.frames.shape == (1, 9, 64, 64, 3)
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    pipe.enable_model_cpu_offload("cpu")
    assert pipe(PROMPT, generator=seeded(3), **CALL).videos.shape == videos.shape
    assert pipe.experts.loaded() == [] and pipe._models == {}


def test_generator_and_scheduler_act(tiny_gguf):
    pipe = load_gguf_pipeline(tiny_gguf, TINY, dtype=torch.float32, device="cpu")
    generator = seeded(3)

    def latents(**call):
        return pipe(PROMPT, output_type="latent", return_dict=False, **{"generator": seeded(3)} | CALL | call)

    first = latents(generator=generator)
    assert torch.equal(first, latents())
    assert not torch.equal(first, latents(generator=generator))  # it was used
    assert not torch.equal(first, latents(shift=2.0))
    assert torch.equal(latents(guidance_scale=0.5), latents(guidance_scale=1))
    pipe.scheduler = scheduler("FlowMatchEulerDiscreteScheduler", shift=2.0)
    euler = latents()
    pipe.scheduler = "Flow"
    assert torch.equal(euler, latents(shift=2.0)) and not torch.equal(euler, latents())
    pipe.scheduler = "PNDM"
    with pytest.warns(UserWarning, match="PNDM"):
        assert torch.equal(first, latents())


def test_bad_calls(tiny_gguf):
    pipe = load_gguf_pipeline(tiny_gguf, TINY, device="cpu")
    for call, message in [
        ({"width": 70}, r"width\*height 70\*64"),
        ({"num_frames": 8}, "^num_frames"),
        ({"num_inference_steps": 0}, "^num_inference_steps must be"),
        ({"latents": torch.zeros(1)}, "latents is not supported"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt is not supported"),
        ({"foo": 1}, "unknown argument foo"),
        ({"output_type": "gif"}, "output_type must be"),
        ({"prompt": ["a", "b"]}, "prompt: one video a call"),
    ]:
        with pytest.raises(UsageError, match=message):
            pipe(**{"prompt": PROMPT, "eta": 0.0, "latents": None} | CALL | call)


def test_bad_pipelines(tiny_gguf, tmp_path):
    def message(gguf_path=tiny_gguf, base=TINY, config=None, **options):
        with pytest.raises(SwanError) as error:
            load_gguf_pipeline(gguf_path, base, config, **{"device": "cpu"} | options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no file absent.gguf" in message("absent.gguf")
    assert "base_model_path: no folder nowhere/x/y" in message(base="nowhere/x/y")
    assert "unknown scheduler dict" in message(scheduler={})
    assert "load_gguf_transformer" in message(pipeline_class=dict)
    assert "dtype must be one of" in message(dtype=torch.float64)
    assert "transformer_config: does not fit t2v-tiny: dim 5120 (the model has 192)" in message(
        transformer_config={"dim": 5120}
    )
    boundary = fun_config(tmp_path / "b.yaml", transformer_additional_kwargs={"boundary": 0.875})
    assert "two experts" in message(config=boundary)
    stride = fun_config(tmp_path / "c.yaml", vae_kwargs={"spatial_compression_ratio": 16})
    assert "spatial_compression_ratio 16 (the VAE of t2v-tiny has 8)" in message(config=stride)
    missing = fun_config(tmp_path / "d.yaml", vae_kwargs={"vae_subpath": "absent.pth"})
    assert "vae is missing; looked for absent.pth" in message(config=missing)
    spec = shrunk("i2v-14B")
    write_checkpoint(tmp_path / "i2v", spec)
    i2v = message(tmp_path / "i2v" / "diffusion_pytorch_model.safetensors")
    assert "holds a Wan i2v transformer" in i2v and "video from text alone is made by: t2v-1.3B" in i2v


def test_import_is_cheap():
    code = "import sys, wan.compat, wan.compat.run_gguf_t2v as r; r.make_parser().format_help()"
    code += "; print(*({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    assert issubclass(WanTransformer, WanTransformerGGUF)
    import wan.compat

    with pytest.raises(AttributeError):
        wan.compat.nothing  # noqa: B018
