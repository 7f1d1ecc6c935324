"""LightVAE, TAEHV and LightTAE: what they compute, how they are told, and videos that are made with them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.unit.weight_helpers import SHARED, DictSource, ShapeSource, manifest
from wan import Engine
from wan.cli import main
from wan.media import read_settings
from wan.models.tae import TAE
from wan.models.vae import empty_vae
from wan.models.vae_base import LATENT_STATS
from wan.plan.runs import decoding
from wan.tasks import load_task
from wan.weights.assign import check_weights
from wan.weights.infer import infer_vae_config, vae_config

TINY = Path(__file__).parents[2] / "wan/assets/tiny"
TAE_FILE = TINY / "taew2_1.safetensors"
SMALL = {
    "2.1": {"z_dim": 16, "patch_size": 1, "widths": [12, 10, 8, 6], "encoder_width": 6},
    "2.2": {"z_dim": 48, "patch_size": 2, "widths": [12, 10, 8, 6], "encoder_width": 6},
}
QUICK = ("--sample_steps", "4", "--frame_num", "5", "--seed", "3", "--device", "cpu", "--quiet")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def small(version, **config):
    torch.manual_seed(0)
    tae = TAE(**(SMALL[version] | config)).eval()
    for one in tae.parameters():
        one.data.mul_(1.5)
    return tae


def conv(weights, name, x, **how):
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **how)


def block(weights, name, x):
    """All frames at once, `[T, C, H, W]`."""
    past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    y = F.relu(conv(weights, f"{name}.conv.0", torch.cat([x, past], 1)))
    y = conv(weights, f"{name}.conv.4", F.relu(conv(weights, f"{name}.conv.2", y)))
    return F.relu(x + y)


def decoded(weights, patch_size, z):
    """The layers of TAEHV's decoder, by their numbers: `[z, T', h, w]` to `[3, T, H, W]` in [0, 1]."""
    x = F.relu(conv(weights, "decoder.1", 3 * torch.tanh(z.movedim(1, 0) / 3)))
    for start, grow in ((3, 1), (9, 2), (15, 2)):
        for layer in range(start, start + 3):
            x = block(weights, f"decoder.{layer}", x)
        x = conv(weights, f"decoder.{start + 4}.conv", F.interpolate(x, scale_factor=2))
        x = x.reshape(-1, x.shape[1] // grow, *x.shape[2:])
        x = conv(weights, f"decoder.{start + 5}", x)
    x = F.pixel_shuffle(conv(weights, "decoder.22", F.relu(x)), patch_size)
    return x.clamp(0, 1)[3:].movedim(0, 1)


def encoded(weights, patch_size, video):
    """The layers of its encoder: `[3, T, H, W]` in [0, 1] to `[z, T', h, w]`."""
    x = video.movedim(1, 0)
    x = F.pixel_unshuffle(torch.cat([x, x[-1:].repeat(-len(x) % 4, 1, 1, 1)]), patch_size)
    x = F.relu(conv(weights, "encoder.0", x))
    for start, pool in ((2, 2), (7, 2), (12, 1)):
        x = conv(weights, f"encoder.{start}.conv", x.reshape(-1, pool * x.shape[1], *x.shape[2:]))
        x = conv(weights, f"encoder.{start + 1}", x, stride=2)
        for layer in range(start + 2, start + 5):
            x = block(weights, f"encoder.{layer}", x)
    return conv(weights, "encoder.17", x).movedim(0, 1)


@pytest.mark.parametrize("version", SMALL)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_tae_computes_what_its_layout_says(version, frames):
    tae = small(version)
    weights, patch = tae.state_dict(), tae.patch_size
    z = 2 * torch.randn(tae.z_dim, frames, 3, 2)
    wanted = decoded(weights, patch, z) * 2 - 1
    assert wanted.std() > 0.1 and wanted.shape == (3, 4 * frames - 3, 24 * patch, 16 * patch)
    assert (tae.decode(z[None])[0] - wanted).abs().max() < 2e-5
    video = torch.rand(3, 4 * frames - 3, 16 * patch, 24 * patch)
    wanted = encoded(weights, patch, video)
    assert wanted.std() > 0.01 and (tae.encode(2 * video[None] - 1)[0] - wanted).abs().max() < 2e-5


def test_a_tae_in_bf16_and_in_tiles():
    tae = small("2.1")
    z = torch.randn(1, 16, 2, 20, 20)
    whole = tae.decode(z)
    tiled = tae.decode(z, tile_px=128)
    assert 0 < (tiled - whole).abs().max() and (tiled - whole).square().mean().sqrt() < 0.02
    assert (tae.to(torch.bfloat16).decode(z) - whole).square().mean().sqrt() < 0.02


def test_memory_does_not_grow_with_the_length():
    """But for the video itself: fp32, and once in 8 bits."""
    how = (48, 48), "fp32", "cpu"
    peaks = [decoding(TAE_CONFIG, (16, latents, *how[0]), *how[1:]).peak for latents in (9, 21)]
    pixels = 3 * 12 * 4 * (8 * 48) ** 2
    assert pixels * 4 <= peaks[1] - peaks[0] <= pixels * 5.1


TAE_CONFIG = {"z_dim": 16, "patch_size": 1, "widths": [256, 128, 64, 64], "encoder_width": 64, "unscaled": False}


@pytest.mark.parametrize("version", SMALL)
def test_told_from_the_tensors(version):
    tae = small(version)
    assert infer_vae_config(DictSource(tae.state_dict())) == SMALL[version] | {"unscaled": False}
    prefixed = {f"model.{name}": one for name, one in tae.state_dict().items()}
    assert infer_vae_config(DictSource(prefixed)) == SMALL[version] | {"unscaled": False}
    alone = {name: one for name, one in tae.state_dict().items() if name.startswith("decoder.")}
    assert infer_vae_config(DictSource(alone))["encoder_width"] == 0
    check_weights(empty_vae(infer_vae_config(DictSource(alone))), DictSource(alone), "vae")


@pytest.mark.skipif(not (SHARED / "facts").is_dir(), reason="needs the shapes of released files")
@pytest.mark.parametrize(
    "name, task, config",
    [
        ("lighttaew2_1", "t2v-14B", TAE_CONFIG),
        ("lighttaew2_2", "ti2v-5B", TAE_CONFIG | {"z_dim": 48, "patch_size": 2}),
        ("lightvaew2_1", "i2v-A14B", {"version": "2.1", "dim": 24, "dec_dim": 24, "z_dim": 16}),
        ("vae2.2", "ti2v-5B", {"version": "2.2", "dim": 160, "dec_dim": 256, "z_dim": 48}),
    ],
)
def test_released_files(name, task, config):
    source = ShapeSource(manifest(name))
    found = vae_config(source, load_task(task))
    assert {key: found[key] for key in config} == config
    check_weights(empty_vae(found), source, "vae")


def test_lighttae_is_told_by_its_name():
    """Its latents are those of the Wan VAE, which the diffusion model sees normalised."""
    weights = small("2.1").state_dict()
    plain, light = (infer_vae_config(DictSource(weights, f"{name}.pth")) for name in ("taew2_1", "LightTAEw2_1"))
    assert (plain["unscaled"], light["unscaled"]) == (False, True)
    taes = [TAE(**config).eval() for config in (plain, light)]
    for tae in taes:
        tae.load_state_dict(weights)
    z, video = torch.randn(1, 16, 2, 2, 2), torch.rand(1, 3, 5, 16, 16)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in LATENT_STATS[16])
    torch.testing.assert_close(taes[1].decode(z), taes[0].decode(z * std + mean))
    torch.testing.assert_close(taes[1].encode(video), (taes[0].encode(video) - mean) / std)


def without(weights, *starts):
    return {name: one for name, one in weights.items() if not name.startswith(starts)}


@pytest.fixture
def files(tmp_path):
    """What is refused, by the name of a file."""
    pruned = {
        name: torch.zeros(one.shape) for name, one in empty_vae({"version": "2.1", "dim": 4}).state_dict().items()
    }
    pruned["decoder.middle.0.residual.2.weight"] = torch.zeros(16, 12, 3, 3, 3)
    shapes = {
        "other_latents": small("2.2").state_dict(),
        "no_encoder": without(small("2.1").state_dict(), "encoder."),
        "super": {"decoder.0.weight": torch.zeros(8, 16, 1, 1), "decoder.1.conv.0.weight": torch.zeros(16, 1, 7, 7)},
        "unknown": {"decoder.blocks.0.weight": torch.zeros(8)},
        "incomplete": without(small("2.1").state_dict(), "decoder.4."),
        "uneven": pruned,
        "not_finite": {name: one * math.inf for name, one in small("2.1").state_dict().items()},
    }
    for name, tensors in shapes.items():
        save_file({key: one.contiguous() for key, one in tensors.items()}, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--tae", "other_latents"), "holds a tiny VAE (TAE, z 48, widths 12, 10, 8, 6); task t2v-tiny needs z 16"),
        (
            ("--vae", "no_encoder", "--task", "i2v-tiny"),
            "a TAE without an encoder, which this task needs; give it with --tae",
        ),
        (("--vae", "super"), "a TAE of the layout Super, which is not read"),
        (("--tae", "unknown"), "LightVAE Pro and Lite are not"),
        (("--tae", "incomplete"), "6 missing (decoder.4.conv.0.weight"),
        (("--vae", "uneven"), "LightVAE Pro and Lite have layouts of their own"),
        (("--tae", "not_finite"), "another file with --tae"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_refusals(files, capsys, flags, words, dry):
    flags = [str(files / f"{flag}.safetensors") if (files / f"{flag}.safetensors").exists() else flag for flag in flags]
    if dry and words.startswith("another"):
        pytest.skip("what numbers a file holds is not looked at")
    assert main([*QUICK, *flags, "--save_file", str(files / "a.mp4"), *(["--dry_run"] if dry else [])]) == 1
    assert words in capsys.readouterr().err


def made(capsys, *flags):
    assert main([*QUICK, *flags]) == 0
    return json.loads(capsys.readouterr().out)["sha256"]


def test_a_tae_decodes_without_a_vae_on_disk(tmp_path, capsys):
    """Where nothing is encoded; the plan has it for what it is; the video stores it."""
    folder = tmp_path / "folder"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("Wan2.1_VAE.pth", TAE_FILE.name))
    base = ("--task", "t2v-tiny", "--ckpt_dir", str(folder))
    assert main([*QUICK, *base, "--dry_run"]) == 1
    assert "missing: " in capsys.readouterr().err
    base = (*base, "--tae", str(TAE_FILE))
    assert main([*QUICK, *base, "--dry_run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    weights = {row["component"]: row["bytes"] for row in plan["weights"]}
    assert "vae" not in weights and weights["tae"] == sum(4 * one.numel() for one in load_file(TAE_FILE).values())
    digest = made(capsys, *base, "--save_file", str(tmp_path / "a.mp4"))
    assert read_settings(tmp_path / "a.mp4")["tae"] == str(TAE_FILE)
    assert made(capsys, "--replay", str(tmp_path / "a.mp4"), *base, "--save_file", str(tmp_path / "b.mp4")) == digest
    assert main([*QUICK, *base, "--video", str(tmp_path / "a.mp4"), "--save_file", str(tmp_path / "c.mp4")]) == 1
    assert "there is no VAE to encode with" in capsys.readouterr().err


def test_what_the_trained_tae_shows_is_what_the_vae_shows():
    """From text, where it decodes and previews, and from a picture, where it also encodes."""
    frames, previews = {}, []
    for name, options in {"vae": {}, "tae": {"tae": str(TAE_FILE)}, "both": {"vae": str(TAE_FILE)}}.items():
        with Engine(task="i2v-tiny", device="cpu", **options) as engine:
            video = engine.generate(
                seed=1,
                sample_steps=8,
                preview_every=8 if name == "tae" else 0,
                on_event=lambda event: previews.append(event.frames) if event.kind == "preview" else None,
            )
            frames[name] = video.frames.astype(np.float32)
    assert psnr(frames["vae"], frames["tae"]) > 20
    assert psnr(frames["vae"], frames["both"]) > 15
    (preview,) = previews
    assert preview.shape == (5, 64, 64, 3) and psnr(preview.astype(np.float32), frames["vae"][::4]) > 18


def psnr(one, other):
    return 10 * math.log10(255**2 / np.square(one - other).mean())


def test_the_embedded_tae_is_small():
    assert TAE_FILE.stat().st_size < 1_000_000
    assert all(one.isfinite().all() for one in load_file(TAE_FILE).values())
