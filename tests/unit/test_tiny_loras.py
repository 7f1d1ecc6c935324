"""The LoRAs of Tiny World: what they bring, that they go, that packed weights agree; and a model of four steps."""

import json
import random
from dataclasses import replace

import pytest
import torch

from benchmarks import tiny_world, tiny_world_lora
from benchmarks.judge import has_stripes, judge
from benchmarks.tiny_world import WORDS, cases, make_request
from benchmarks.tiny_world_gguf import psnr
from benchmarks.tiny_world_lora import I2V, PRESET, lora
from tools.tiny.world import SIZES, combinations, render, sample
from wan.pipeline import WanPipeline
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf


def open_pipe(task="t2v-tiny", **options):
    return WanPipeline.from_request(make_request(None, 0, None, None, task=task, **options), load_task(task))


@pytest.fixture(scope="module")
def pipe():
    return open_pipe()


def made(pipe, index, **options):
    """The benchmark's clip of that number: (what was asked, frames)."""
    clip, seed = cases()[index]
    return clip, pipe(make_request(clip.prompt, seed, None, None, **options)).frames


def right(clip, frames):
    return sum(getattr(judge(frames), word) == getattr(clip, word) for word in WORDS)


def test_stripes_come_with_the_strength_and_words_stay(pipe):
    pipe.set_loras()
    assert not has_stripes(made(pipe, 0)[1])
    pipe.set_loras(lora("stripes"))
    clips = [made(pipe, index) for index in range(3)]
    assert all(has_stripes(frames) for _, frames in clips)
    for clip, frames in clips:
        assert judge(frames)[2:] == (clip.direction, clip.background) and judge(frames).color == clip.color


def test_strength_0_and_removal_are_the_base_bit_for_bit(pipe):
    def latents():
        return pipe(make_request(cases()[0][0].prompt, 0, 4, None)).latents

    pipe.set_loras()
    base = latents()
    pipe.set_loras((lora("stripes"), 0))
    assert torch.equal(latents(), base)
    pipe.set_loras(lora("stripes"))
    assert not torch.equal(latents(), base)
    pipe.set_loras()
    assert torch.equal(latents(), base)


def test_beside_packed_weights_as_merged_into_dense_ones(tmp_path):
    file = embedded_checkpoint(load_task("t2v-tiny")) / "diffusion_pytorch_model.safetensors"
    export_gguf(open_source(file), tmp_path / "dit.gguf", "Q8_0")
    gguf = {"gguf": str(tmp_path / "dit.gguf"), "lora": lora("stripes")}
    merged, beside = (open_pipe(gguf_mode=mode, **gguf) for mode in ("resident", "stream"))
    (_, one), (_, other) = made(merged, 0), made(beside, 0)
    assert has_stripes(one) and has_stripes(other) and judge(one) == judge(other)
    assert psnr(one, other) > 45


def test_each_expert_has_its_own():
    task = load_task(I2V)
    pipe = open_pipe(I2V)
    paths = {name: lora(f"stripes-{name}", I2V) for name in ("high", "low")}
    base = {name: _weights(pipe, name) for name in paths}

    def changed(**flags):
        pipe.set_loras(**flags)
        return {name for name, weights in base.items() if not torch.equal(_weights(pipe, name), weights)}

    assert changed(lora_high=paths["high"]) == {"high"} and changed(lora_low=paths["low"]) == {"low"}
    assert changed(lora_high=paths["high"], lora_low=paths["low"]) == {"high", "low"}
    request = make_request(task.prompt, 0, None, None, task=I2V)
    frames = pipe(request).frames
    assert has_stripes(frames) and not has_stripes(frames[[0, 0]])  # the first frame was given
    assert changed() == set() and not has_stripes(pipe(request).frames)


def _weights(pipe, expert):
    return torch.cat([weight.flatten() for weight in pipe.experts[expert].parameters()])


def test_four_steps_of_the_distilled_model_are_near_twenty(pipe):
    indices = (3, 5, 9, 12)
    pipe.set_loras()
    many = [made(pipe, index)[1] for index in indices[:2]]
    plain = [made(pipe, index, preset=PRESET) for index in indices]
    pipe.set_loras(lora(PRESET))
    distilled = [made(pipe, index, preset=PRESET) for index in indices]
    assert sum(right(*one) for one in distilled) >= 11 and sum(right(*one) for one in plain) <= 10
    for frames, (_, with_lora), (_, without) in zip(many, distilled, plain):
        assert psnr(with_lora, frames) > psnr(without, frames)


def test_the_judge_knows_rendered_stripes():
    rng = random.Random(3)
    for combo in combinations()[::2]:
        clip, size = sample(rng, [combo]), rng.choice(SIZES)
        for start in (None, 0, 1):
            pixels = ((render(replace(clip, stripes_from=start), *size) + 1) * 127.5).round()
            frames = pixels.byte().permute(1, 2, 3, 0).numpy()
            assert has_stripes(frames) == (start is not None)
            assert judge(frames) == (clip.color, clip.shape, clip.direction, clip.background)


def test_all_of_them_are_small():
    folders = [embedded_checkpoint(load_task(task)) / "loras" for task in ("t2v-tiny", I2V)]
    sizes = [file.stat().st_size for folder in folders for file in folder.iterdir()]
    assert len(sizes) == 4 and sum(sizes) <= 4e6


def test_benchmarks(capsys):
    flags = ["--lora", f"{lora('stripes')}:0.5", "--preset", PRESET, "--clips", "1"]
    assert tiny_world.main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loras"] == {"lora": ["stripes.safetensors:0.5"]} and found["steps"] == 4 and "stripes" in found
    assert tiny_world_lora.main(["distilled", "--clips", "1"]) == 0
    assert [row["steps"] for row in json.loads(capsys.readouterr().out)["rows"]] == [20, 4, 4, 4, 4]
