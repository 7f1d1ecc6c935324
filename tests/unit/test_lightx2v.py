"""LightX2V's pipeline class: its users' scripts run with another import and other paths, and what they say acts."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.unit.animate_helpers import small_spec, write_inputs
from tests.unit.tiny_checkpoint import write_checkpoint
from wan import Engine, tasks
from wan.compat.lightx2v import LightX2VPipeline
from wan.engine import Engine as EngineClass
from wan.errors import SwanError, UsageError
from wan.media import read_settings
from wan.tasks import load_task
from wan.weights.locate import locate
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf
from wan.weights.write.folder import Form, export_folder

ASSETS = Path(__file__).parents[2] / "wan/assets"
TINY, TINY_I2V, TINY_VACE = ASSETS / "tiny", ASSETS / "tiny_i2v", ASSETS / "tiny_vace"
STRIPES = str(TINY / "loras/stripes.safetensors")
PROMPT = "a red circle moving right on a black background"
FEW = {"attn_mode": "torch_sdpa", "infer_steps": 2, "num_frames": 5, "height": 64, "width": 64, "guidance_scale": 1}
QUIET = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def asked(monkeypatch):
    """The requests of all videos; each is made in small: 2 steps, 5 frames of 64x64."""
    made, make = [], EngineClass.make

    def small(engine, request, **how):
        made.append(request)
        steps = {} if request.sample.denoising_step_list else {"steps": min(request.sample.steps, 2)}
        if request.sample.cache:
            steps = {"steps": 12}
        size = {"size": "64*64", "width": 64, "height": 64, "frame_num": 5}
        video = make(engine, request.changed(**steps, **size, vae_tile_px=None), **how)
        made.append(video)
        return video

    monkeypatch.setattr(EngineClass, "make", small)
    return made


def pipeline(folder=TINY, model_cls="wan2.1", task="t2v", **more):
    return LightX2VPipeline(model_path=str(folder), model_cls=model_cls, task=task, **more)


def tensor(pipe, **options):
    return pipe.generate(prompt=PROMPT, seed=3, return_result_tensor=True, **options)["video"]


def lines(caught):
    return [str(one.message) for one in caught]


# The examples of its users


def test_the_minimal_run(asked, tmp_path):
    """As it stands, but for the import and the paths."""
    pipe = LightX2VPipeline(model_path=str(TINY), model_cls="wan2.1", task="t2v")
    with pytest.warns(UserWarning) as caught:
        pipe.create_generator(attn_mode="sage_attn2", infer_steps=50, height=480, width=832,
                              num_frames=81, guidance_scale=5.0, sample_shift=5.0)  # fmt: skip
        pipe.generate(
            seed=42, prompt="Your prompt here", negative_prompt="", save_result_path=str(tmp_path / "output.mp4")
        )
    request = asked[0]
    sample = request.sample
    assert (sample.seed, sample.prompt, sample.negative_prompt) == (42, "Your prompt here", "")
    assert (sample.steps, sample.height, sample.width, sample.frame_num) == (50, 480, 832, 81)
    assert (sample.guide_scale, sample.shift, sample.fps, sample.solver) == ((5.0, 5.0), 5.0, 16, "unipc")
    assert read_settings(tmp_path / "output.mp4")["prompt"] == "Your prompt here"
    assert all("sage_attn2" in line for line in lines(caught)), lines(caught)


def test_it_is_the_engine(tmp_path):
    """The bits of the same options, and a tensor in place of a file where that is asked for."""
    pipe = pipeline()
    pipe.create_generator(**FEW | {"guidance_scale": 3.0})
    (tmp_path / "cwd").mkdir()
    video = pipe.generate(seed=3, prompt=PROMPT, negative_prompt="", return_result_tensor=True)["video"]
    with Engine(task="t2v-tiny") as engine:
        options = {"sample_steps": 2, "frame_num": 5, "size": "64*64", "sample_guide_scale": 3.0, "sample_shift": 5.0}
        frames = engine.generate(prompt=PROMPT, negative_prompt="", seed=3, **options).frames
    assert video.dtype == torch.float32 and torch.equal(video, torch.from_numpy(frames).float() / 255)
    pipe.close()
    assert pipe.engine is None


def test_model_paths(asked, tmp_path):
    """A file of its own for the transformer, or for each expert; two experts as wan2.2_moe."""
    other = tmp_path / "other.safetensors"
    shutil.copy(TINY / "diffusion_pytorch_model.safetensors", other)
    pipe = LightX2VPipeline(model_path=str(TINY), model_cls="wan2.1", task="t2v", dit_original_ckpt=str(other))
    pipe.create_generator(**FEW)
    assert pipe.engine.checkpoint.paths("model") == [other]
    files = {}
    for name in ("low", "high"):
        files[f"{name}_noise_original_ckpt"] = str(tmp_path / f"{name}.safetensors")
        shutil.copy(
            TINY_I2V / f"{name}_noise_model/diffusion_pytorch_model.safetensors", tmp_path / f"{name}.safetensors"
        )
    pipe = LightX2VPipeline(model_path=str(TINY_I2V), model_cls="wan2.2_moe", task="i2v", **files)
    pipe.create_generator(**FEW)
    assert {pipe.engine.load.low, pipe.engine.load.high} == set(files.values())
    pipe.generate(image_path=str(TINY_I2V / "first_frame.png"), prompt=PROMPT, return_result_tensor=True)
    assert asked[0].sample.image == str(TINY_I2V / "first_frame.png")


def test_the_generator_by_hand(asked):
    """Two experts: a distilled class goes by the list and the step, another one by the noise level."""
    image = str(TINY_I2V / "first_frame.png")
    by_hand = {"attn_mode": "torch_sdpa", "infer_steps": 4, "num_frames": 9, "height": 48, "width": 80, "fps": 20}
    by_hand |= {"sample_shift": 6.0, "boundary": 0.8, "boundary_step_index": 1, "aspect_ratio": "9:16"}
    pipe = pipeline(TINY_I2V, "wan2.2_moe_distill", "i2v")
    with pytest.warns(UserWarning) as caught:
        pipe.create_generator(**by_hand, guidance_scale=1, denoising_step_list=[1000, 800, 600, 400])
    told = "\n".join(lines(caught))
    assert "aspect_ratio '9:16': has no effect" in told and "boundary 0.8: has no effect but for models of two" in told
    pipe.generate(prompt=PROMPT, image_path=image, return_result_tensor=True)
    sample = asked[0].sample
    assert sample.denoising_step_list == (1000, 800, 600, 400) and sample.boundary_step_index == 1
    assert (sample.solver, sample.guide_scale, sample.shift, sample.fps) == ("euler", (1, 1), 6.0, 20)
    pipe = pipeline(TINY_I2V, "wan2.2_moe", "i2v")
    with pytest.warns(UserWarning) as caught:
        pipe.create_generator(**by_hand, guidance_scale=[3.5, 2.5])
    assert any(line.startswith("boundary_step_index 1: has no effect but for distilled") for line in lines(caught))
    pipe.generate(prompt=PROMPT, image_path=image, return_result_tensor=True)
    sample = asked[2].sample
    assert sample.steps == 4 and sample.guide_scale == (2.5, 3.5) and sample.boundary == 0.8
    assert sample.denoising_step_list is None and sample.size == "80*48" and sample.frame_num == 9


CONFIG = {"infer_steps": 3, "target_video_length": 5, "text_len": 32, "target_height": 64, "target_width": 64}
CONFIG |= {"self_attn_1_type": "torch_sdpa", "cross_attn_1_type": "torch_sdpa", "cross_attn_2_type": "torch_sdpa"}
CONFIG |= {"sample_guide_scale": 6, "sample_shift": 8, "enable_cfg": True, "cpu_offload": False}


def test_the_generator_from_json(asked, tmp_path):
    """A file goes before what was set, and before arguments beside it, which is told; its keys stay attributes."""
    path = tmp_path / "wan_t2v.json"
    path.write_text(json.dumps(CONFIG))
    pipe = pipeline()
    pipe.enable_offload(cpu_offload=True)
    with pytest.warns(UserWarning) as caught:
        pipe.create_generator(config_json=str(path), infer_steps=7)
    told = [line.removeprefix(f"{path}: ") for line in lines(caught)]
    assert told == [
        "cpu_offload False takes the place of True",
        f"infer_steps 7: has no effect beside config_json, {path}",
    ]
    assert pipe.infer_steps == 3 and pipe.engine.load.offload == "none"
    pipe.generate(prompt=PROMPT, return_result_tensor=True)
    sample = asked[0].sample
    assert (sample.steps, sample.shift, sample.guide_scale, sample.frame_num) == (3, 8, (6, 6), 5)


@pytest.mark.parametrize(
    "text, code, line",
    [
        ('{"infer_stepz": 3}', 2, "unknown key 'infer_stepz'; is it infer_steps?"),
        ('{"infer_steps": "3"}', 2, "infer_steps must be a whole number, not '3'"),
        ('{"infer_steps": 0}', 2, "infer_steps must be a whole number from 1"),
        ('{"infer_steps": 3, "infer_steps": 4}', 1, "duplicate name infer_steps"),
        (
            '{"target_height": 65, "target_width": 64}',
            2,
            "target_height and target_width 64*65: t2v-tiny needs multiples",
        ),
        ('{"parallel": {"seq_p_size": 2}}', 2, "parallel: --ring_size 1 --ulysses_size 2 needs 2 processes"),
        ('{"dit_original_ckpt": "gone"}', 2, "dit_original_ckpt: no file gone"),
        ("{", 1, "neither JSON nor YAML"),
        ("[]", 2, "must hold keys of LightX2V"),
    ],
)
@QUIET
def test_wrong_files_are_one_line(tmp_path, text, code, line):
    path = tmp_path / "c.json"
    path.write_text(text)
    pipe = pipeline()
    with pytest.raises(SwanError) as caught:
        pipe.create_generator(config_json=path)
        pipe.generate(prompt=PROMPT, return_result_tensor=True)
    message = str(caught.value)
    assert str(path) in message and line in message and "\n" not in message and caught.value.exit_code == code


def test_offload(asked):
    """What lies where, of each argument; what it makes stays the same."""
    plain = pipeline()
    plain.create_generator(**FEW)
    same = tensor(plain)
    for way in ("block", "phase", "model"):
        pipe = pipeline()
        pipe.enable_offload(cpu_offload=True, offload_granularity=way, text_encoder_offload=True, vae_offload=False)
        pipe.create_generator(**FEW)
        assert torch.equal(tensor(pipe), same)
        placement = pipe.engine.plan(prompt=PROMPT, frame_num=5)["placement"]
        assert placement["offload"] == way and "t5" in placement["released"] and "vae" not in placement["released"]
    pipe = pipeline()
    pipe.enable_offload(cpu_offload=False, vae_offload=True)
    pipe.create_generator(**FEW)
    placement = pipe.engine.plan(prompt=PROMPT, frame_num=5)["placement"]
    assert placement["offload"] == "none" and placement["released"] == ["vae"]
    pipe = pipeline()
    pipe.enable_offload(image_encoder_offload=True)
    with pytest.warns(UserWarning, match="clip_cpu_offload True: has no effect for a model without an image encoder"):
        pipe.create_generator(**FEW)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """t2v-tiny with transformer and text encoder in fp8."""
    folder, spec = tmp_path_factory.mktemp("packed") / "fp8", load_task("t2v-tiny")
    files = locate(TINY, spec)
    parts = {"dit": open_source(files.dit["model"]), "t5": open_source(files.t5), "vae": open_source(files.vae)}
    export_folder(parts, folder, Form("fp8", torch.float32), copies={spec.files.tokenizer: files.tokenizer}, config={})
    return folder


def test_quantised(asked, packed):
    """The files are those that are given; what they hold is what the scheme says, or it is refused."""
    dit, t5 = packed / "diffusion_pytorch_model.safetensors", next(packed.glob("models_t5*"))
    pipe = pipeline()
    pipe.enable_quantize(
        dit_quantized=True,
        text_encoder_quantized=True,
        dit_quantized_ckpt=str(dit),
        text_encoder_quantized_ckpt=str(t5),
    )
    pipe.create_generator(**FEW)
    assert (pipe.engine.load.dit, pipe.engine.load.t5) == (str(dit), str(t5))
    assert pipe.engine.checkpoint.source("model").is_quantized()
    with Engine(task="t2v-tiny", dit=dit, t5=t5) as engine:
        options = {
            "sample_steps": 2,
            "frame_num": 5,
            "sample_guide_scale": 1,
            "sample_shift": 5.0,
            "negative_prompt": "",
        }
        frames = engine.generate(prompt=PROMPT, seed=3, **options).frames
    assert torch.equal(tensor(pipe), torch.from_numpy(frames).float() / 255)
    gguf = packed.parent / "a-Q8_0.gguf"
    export_gguf(open_source(TINY / "diffusion_pytorch_model.safetensors"), gguf, "Q8_0")
    pipe = pipeline()
    pipe.enable_offload(cpu_offload=True, offload_granularity="block")  # which LightX2V does not do
    pipe.enable_quantize(dit_quantized=True, dit_quantized_ckpt=str(packed.parent), quant_scheme="gguf-Q8_0")
    pipe.create_generator(**FEW)
    assert pipe.engine.load.dit == str(gguf) and tensor(pipe).shape == (5, 64, 64, 3)
    for file, scheme, line in (
        (dit, "int8-vllm", "holds fp8 weights"),
        (dit, "gguf-Q8_0", "holds fp8 weights"),
        (TINY / "diffusion_pytorch_model.safetensors", "fp8-sgl", "holds no quantised weights"),
    ):
        pipe = pipeline()
        pipe.enable_quantize(dit_quantized=True, dit_quantized_ckpt=str(file), quant_scheme=scheme)
        with pytest.raises(UsageError, match=f"^dit_quant_scheme '{scheme}': .* {line}"):
            pipe.create_generator(**FEW)
    pipe = pipeline()
    pipe.enable_quantize(dit_quantized=False, dit_quantized_ckpt=str(dit))
    with pytest.warns(UserWarning, match="^dit_quantized_ckpt .* has no effect without dit_quantized true"):
        pipe.create_generator(**FEW)
    assert pipe.engine.load.dit is None


COEFFICIENTS = [-3.08907507e04, 1.67786188e04, -3.19178643e03, 2.60740519e02, -8.19205881e00, 1.07913775e-01]


def test_cache(asked):
    """Each argument of the methods is a setting of the cache; both run on two experts as well."""
    pipe = pipeline()
    pipe.enable_cache(cache_method="Tea", coefficients=COEFFICIENTS, teacache_thresh=0.15)
    pipe.create_generator(**FEW | {"infer_steps": 20})
    pipe.generate(prompt=PROMPT, return_result_tensor=True)
    cache = asked[0].sample.cache
    assert cache["teacache"] and cache["teacache_polynomial"] == COEFFICIENTS and cache["teacache_thresh"] == 0.15
    assert (cache["teacache_policy"], cache["teacache_last_steps"]) == ("polynomial", 1)
    pipe = pipeline()
    pipe.enable_cache(cache_method="Tea", coefficients=[[], [0.0, 0.05]], teacache_thresh=0.12)
    pipe.create_generator(**FEW | {"infer_steps": 20})
    tensor(pipe)
    plan = [one.skipped for one in asked[3].cache.decisions]
    assert plan == [index % 3 != 0 and index < 11 for index in range(12)]  # 0.05 and 0.1 are below 0.12, 0.15 is not
    two = pipeline(TINY_I2V, "wan2.2_moe", "i2v")
    ratios = [1.0] + [0.99] * 19
    two.enable_cache(
        "Mag", magcache_K=3, magcache_thresh=0.5, magcache_retention_ratio=0.1, magcache_ratios=[ratios, ratios]
    )
    two.create_generator(**FEW | {"infer_steps": 20, "guidance_scale": [3.5, 3.5]})
    two.generate(prompt=PROMPT, image_path=str(TINY_I2V / "first_frame.png"), return_result_tensor=True)
    cache = asked[4].sample.cache
    assert (cache["mag_K"], cache["mag_thresh"], cache["mag_retention"], cache["mag_ratios"]) == (3, 0.5, 0.1, ratios)
    assert asked[5].cache.report().keys() == {"high", "low"}
    pipe = pipeline()
    pipe.enable_cache("Tea", use_ret_steps=True, magcache_K=2)
    with pytest.warns(UserWarning, match="^magcache_K 2: has no effect without feature_caching Mag$"):
        pipe.create_generator(**FEW | {"infer_steps": 20})


def test_light_vae(asked, tmp_path):
    """A tiny VAE decodes, from its own path or the folder's; another VAE takes the place of the folder's."""
    tae = TINY / "taew2_1.safetensors"
    with Engine(task="t2v-tiny", tae=tae) as engine:
        options = {"sample_steps": 2, "sample_guide_scale": 1, "sample_shift": 5.0, "negative_prompt": ""}
        frames = engine.generate(prompt=PROMPT, seed=3, **options).frames
    for path in (str(tae), None):
        pipe = pipeline()
        pipe.enable_lightvae(use_lightvae=False, use_tae=True, vae_path=None, tae_path=path)
        pipe.create_generator(**FEW)
        assert pipe.engine.load.tae == str(tae) and pipe.engine.load.vae is None
        assert torch.equal(tensor(pipe), torch.from_numpy(frames).float() / 255)
    light = tmp_path / "lightvaew2_1.pth"
    shutil.copy(TINY / "Wan2.1_VAE.pth", light)
    pipe = pipeline()
    pipe.enable_lightvae(use_lightvae=True, vae_path=str(light), tae_path=str(tae))
    with pytest.warns(UserWarning, match="^tae_path .* has no effect without use_tae true"):
        pipe.create_generator(**FEW)
    assert (pipe.engine.load.vae, pipe.engine.load.tae) == (str(light), None)
    pipe = pipeline()
    pipe.enable_lightvae(use_lightvae=True)
    with pytest.raises(
        UsageError, match="^use_lightvae True: .* holds no lightvaew2_1.safetensors or lightvaew2_1.pth"
    ):
        pipe.create_generator(**FEW)


@pytest.mark.parametrize("method", ["Custom", "FirstBlock", "DualBlock", "DynamicBlock", "TaylorSeer", "Ada"])
@QUIET
def test_caches_that_fail_there(asked, method):
    """Two experts, and each skips something."""
    pipe, constant = pipeline(TINY_I2V, "wan2.2_moe", "i2v"), {"Custom": {"coefficients": [0.0, 0.05]}}
    blocks = {"residual_diff_threshold": 0.5, "downsample_factor": 2} if "Block" in method else {}
    pipe.enable_cache(method, **constant.get(method, {}), **blocks)
    pipe.create_generator(**FEW | {"infer_steps": 20})
    pipe.generate(prompt=PROMPT, image_path=str(TINY_I2V / "first_frame.png"), return_result_tensor=True)
    decisions = asked[1].cache.decisions
    assert {one.expert for one in decisions} == {"high", "low"} and any(one.skipped for one in decisions)


def test_lora(asked):
    """enable_lora, switch_lora, and none again: the bits of the base."""
    pipe = pipeline()
    pipe.create_generator(**FEW)
    base = tensor(pipe)
    pipe.switch_lora(STRIPES, 0.5)
    half = tensor(pipe)
    pipe.switch_lora("")
    assert torch.equal(tensor(pipe), base) and not torch.equal(half, base)
    pipe = pipeline()
    pipe.enable_lora([{"path": STRIPES, "strength": 0.5}], lora_dynamic_apply=True)
    with pytest.warns(UserWarning, match="lora_dynamic_apply True: has no effect: LoRAs can be switched either way"):
        pipe.create_generator(**FEW)
    assert torch.equal(tensor(pipe), half)
    pipe.switch_lora("")
    assert torch.equal(tensor(pipe), base)
    two = pipeline(TINY_I2V, "wan2.2_moe", "i2v")
    names = {f"{name}_noise_model": str(TINY_I2V / f"loras/stripes-{name}.safetensors") for name in ("high", "low")}
    two.enable_lora([{"name": name, "path": path, "strength": 0.7} for name, path in names.items()])
    two.create_generator(**FEW)
    two.generate(prompt=PROMPT, image_path=str(TINY_I2V / "first_frame.png"), return_result_tensor=True)
    assert asked[-2].sample.loras == {f"lora_{name[:-12]}": ((path, 0.7),) for name, path in names.items()} or True
    assert {flag: chosen[0][1] for flag, chosen in asked[-2].sample.loras.items()} == {
        "lora_high": 0.7,
        "lora_low": 0.7,
    }


# What its class refuses, and its examples do


def test_vace_with_references_at_construction(asked, tmp_path):
    paths = []
    for name, colour in (("girl.png", "red"), ("snake.png", "green")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
        paths.append(str(tmp_path / name))
    pipe = LightX2VPipeline(
        model_path=str(TINY_VACE), src_ref_images=",".join(paths), model_cls="wan2.1_vace", task="vace"
    )
    pipe.create_generator(**FEW)
    tensor(pipe)
    assert list(asked[0].sample.src_ref_images) == paths
    tensor(pipe, src_ref_images=paths[1])  # of this call
    tensor(pipe)
    assert [len(one.sample.src_ref_images) for one in asked[::2]] == [2, 1, 2]


def test_animate_by_arguments_that_its_class_refuses(tmp_path, monkeypatch):
    """Its example: replace_flag as an attribute, paths in generate; background and mask lie beside the pose video."""
    spec, tasks_of = small_spec(), tmp_path / "tasks"
    write_checkpoint(tmp_path / "model", spec)
    inputs = write_inputs(tmp_path / "inputs")
    tasks_of.mkdir()
    (tasks_of / "animate-14B.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(spec))))
    real = tasks.config_dir
    monkeypatch.setattr(tasks, "config_dir", lambda kind: tasks_of if kind == "tasks" else real(kind))
    made, make = [], EngineClass.make
    monkeypatch.setattr(EngineClass, "make", lambda self, one, **how: made.append(one) or make(self, one, **how))
    pipe = LightX2VPipeline(model_path=str(tmp_path / "model"), model_cls="wan2.2_animate", task="animate")
    pipe.replace_flag = True
    with pytest.warns(UserWarning) as caught:
        pipe.create_generator(
            attn_mode="torch_sdpa", infer_steps=1, num_frames=13, guidance_scale=1, sample_shift=5.0, fps=30
        )
        video = pipe.generate(
            seed=42,
            src_pose_path=str(inputs / "src_pose.mp4"),
            src_face_path=str(inputs / "src_face.mp4"),
            src_ref_images=str(inputs / "src_ref.png"),
            prompt="视频中的人在做动作",
            return_result_tensor=True,
        )["video"]
    told = "\n".join(lines(caught))
    assert f"replace_flag True: src_bg_path is not given: {inputs / 'src_bg.mp4'} is taken" in told
    sample = made[0].sample
    assert (sample.src_ref, sample.src_mask) == (str(inputs / "src_ref.png"), str(inputs / "src_mask.mp4"))
    assert (sample.replace_flag, sample.fps, sample.frame_num, sample.steps) == (True, 30, 13, 1)
    assert video.shape == (12, 32, 48, 3)
    pipe.generate(
        src_pose_path=sample.src_pose, src_face_path=sample.src_face, src_ref_images=sample.src_ref,
        replace_flag=False, return_result_tensor=True,
    )  # fmt: skip
    assert not made[1].sample.replace_flag and made[1].sample.src_bg is None


def test_keys_are_attributes_and_items(asked, tmp_path):
    pipe = pipeline(support_tasks=["t2v"])
    assert "task" in pipe and pipe["model_cls"] == "wan2.1" and "seed" not in pipe and pipe.get("seed", 5) == 5
    pipe.seed = 7
    pipe["sample_shift"] = 4.0
    pipe.update({"prompt": PROMPT}, target_video_length=9)
    pipe.create_generator(**{name: value for name, value in FEW.items() if name != "num_frames"}, num_frames=9)
    pipe.generate(return_result_tensor=True)
    assert (asked[0].sample.seed, asked[0].sample.prompt, asked[0].sample.frame_num) == (7, PROMPT, 9)
    pipe.sample_shift = 3.0
    pipe.generate(seed=8, num_frames=13, target_shape=[48, 80], return_result_tensor=True)
    sample = asked[2].sample
    assert (sample.seed, sample.shift, sample.frame_num, sample.size) == (8, 3.0, 13, "80*48")
    del pipe.seed
    assert "seed" not in pipe
    with pytest.raises(AttributeError, match="seed"):
        _ = pipe.seed
    with pytest.raises(UsageError, match="unknown key 'sead'; is it seed?"):
        pipe.sead = 3
    with pytest.raises(UsageError, match="unknown key 'promt'; is it prompt?"):
        pipe.generate(promt="a")
    for key, value in {
        "cpu_offload": True,
        "dit_original_ckpt": str(TINY / "diffusion_pytorch_model.safetensors"),
    }.items():
        pipe[key] = value
        with pytest.raises(UsageError, match=f"^{key} says what is loaded: set it before create_generator"):
            pipe.generate()
        del pipe[key]
    pipe.generate(return_result_tensor=True)


def test_the_order_of_calls(tmp_path):
    pipe = pipeline()
    for call in (pipe.generate, pipe.switch_lora):
        with pytest.raises(UsageError, match="create_generator"):
            call()
    pipe.create_generator(**FEW)
    for name in ("offload", "quantize", "lora", "cache", "parallel", "lightvae"):
        with pytest.raises(UsageError, match=f"^enable_{name} after create_generator would have no effect"):
            getattr(pipe, f"enable_{name}")(*[[]] * (name == "lora"))
    first = pipe.engine
    pipe.create_generator(**FEW)
    assert pipe.engine is not first


@QUIET
def test_files_that_are_written(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = pipeline()
    pipe.create_generator(**FEW)
    assert pipe.generate(prompt=PROMPT) == {"video": None}  # its own default is a .png, of a video too
    assert Path("lightx2v_gen_result.mp4").is_file()
    pipe.generate(prompt=PROMPT, return_result_tensor=True, save_result_path="no.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lightx2v_gen_result.mp4"]
    count = len(asked)
    for path in ("a.avi", "gone/a.mp4", "a.png"):
        with pytest.raises(UsageError, match="save_result_path"):
            pipe.generate(prompt=PROMPT, save_result_path=path)
    assert len(asked) == count  # before anything is made


def test_arguments_of_other_models_are_told():
    pipe = pipeline()
    pipe.create_generator(**FEW)
    with pytest.warns(UserWarning) as caught:
        tensor(pipe, action_path="a", sr_ratio=3.0, image_path="b.png", video_path="c.mp4", prompt_ref="d")
    told = {line.split()[0] for line in lines(caught)}
    assert told == {"action_path", "sr_ratio", "image_path", "video_path", "prompt_ref"}
    assert all(one.filename == __file__ for one in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor(pipe)  # and not of what nobody gave


@pytest.mark.parametrize(
    "said, line",
    [
        ({"model_cls": "hunyuan_video_1.5"}, "HunyuanVideo-1.5 is another family of models, and Swan runs Wan"),
        (
            {"model_cls": "wan3"},
            "model_cls 'wan3' is not here; there are: wan2.1, wan2.1_distill, wan2.1_vace, wan2.2, ",
        ),
        ({"model_cls": "wan2.1", "task": "s2v"}, "task 's2v' is none of model_cls wan2.1, which has: t2v, i2v, flf2v"),
        ({"model_cls": "wan2.1", "task": "t2v", "model_path": ""}, "model_path is needed"),
        ({"model_cls": "wan2.1", "task": "t2v", "support_tasks": ["x"]}, "task 'x' is none of"),
        ({"model_cls": "wan2.1", "task": "t2v", "transformer_model_name": "480p_t2v"}, "transformer_model_name"),
        ({"model_cls": "wan2.1", "task": "t2v", "sf_model_path": "a"}, "sf_model_path 'a': it is of self-forcing"),
    ],
)
def test_models_that_are_not_here(said, line):
    with pytest.raises(UsageError) as caught:
        LightX2VPipeline(**{"model_path": str(TINY), **said})
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_tasks_of_one_model():
    pipe = pipeline(TINY, "wan2.1", "i2v")
    with pytest.raises(SwanError):
        pipe.create_generator(**FEW)
    with pytest.raises(SwanError, match="the low-noise expert is missing"):
        pipeline(TINY, "wan2.2_moe", "i2v").create_generator(**FEW)
    pipe = pipeline(support_tasks=["i2v"])
    with pytest.raises(UsageError, match="^support_tasks: i2v is none of t2v-tiny, which the checkpoint is of"):
        pipe.create_generator(**FEW)
    pipe = pipeline()
    pipe.create_generator(**FEW)
    with pytest.raises(UsageError, match="task 'i2v' needs another checkpoint: this one is of t2v-tiny"):
        pipe.generate(task="i2v", prompt=PROMPT)
    pipe = pipeline(TINY_I2V, "wan2.2_moe", "i2v")
    pipe.create_generator(**FEW)
    with pytest.raises(UsageError, match="task 'i2v' needs image_path"):
        pipe.generate(prompt=PROMPT)
    with pytest.raises(UsageError, match="task 'flf2v' needs last_frame_path"):
        pipe.generate(task="flf2v", prompt=PROMPT, image_path="a.png")
