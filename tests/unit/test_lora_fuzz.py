"""Damaged LoRA files: each is refused with an error of ours, or adds what its tensors say."""

import json

import pytest
import torch
from safetensors.torch import load, save

from tests.mutations import BATCHES, survive
from tests.unit.test_lora import BASE, FFN, SHAPES, STATE, Q, families, noise, pair
from tests.unit.test_lora import load as load_model
from wan.weights.lora import open_lora, set_loras


def factors(stem, shape, names=("lora_up.weight", "lora_down.weight"), **others):
    tensors = dict(zip(names, pair(*shape, rank=2))) | others
    return {f"{stem}.{name}": one for name, one in tensors.items()}


def bases():
    """One file of each way to write a LoRA."""
    ffn, q, flat = (96, 64), (64, 64), f"lycoris_{Q.replace('.', '_')}"
    comfy = factors(f"diffusion_model.{FFN}", ffn, alpha=torch.tensor(1.0), diff_b=noise(96))
    kohya = factors("lora_unet_blocks_1_self_attn.q", q, alpha=torch.tensor(4.0), dora_scale=noise(64).abs() + 1)
    peft = factors(f"base_model.model.{FFN}", ffn, ("lora_B.default.weight", "lora_A.default.weight"))
    peft |= factors(Q, q, ("lora_B", "lora_A"))
    told = {"lora_alpha": "8", "alpha_pattern": json.dumps({"ffn.0": 2, "blocks.9.ffn.2": 3}), "use_rslora": "true"}
    halves = factors(f"transformer.{FFN}", ffn) | factors(f"transformer_2.{FFN}", ffn)
    packed = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer_2.lora_alpha": 2})}
    lycoris = {f"{flat}.diff": noise(64, 64), f"{flat}.diff_b": noise(64)}
    lycoris |= {f"lycoris_blocks_0_ffn_0{key}": one for key, one in families()["lokr both in two"][0].items()}
    files = [(comfy, None), (kohya, None), (peft, told), (halves, packed), (lycoris, None)]
    return [save({key: one.half().contiguous() for key, one in held.items()}, told) for held, told in files]


BASES = bases()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damaged_files(tmp_path, batch):
    path, model, experts = tmp_path / "a.safetensors", load_model(), ("high", "low")
    parameters = dict(model.named_parameters())

    def attempt(data):
        path.write_bytes(data)
        for expert in experts:
            opened = open_lora(path, SHAPES, expert)
            try:
                set_loras(model, BASE, [(opened, 0.5)])
                check(opened, load(data))
            finally:
                set_loras(model, BASE, [])

    def check(opened, tensors):
        for name, updates in opened.updates.items():
            assert parameters[name].isfinite().all(), f"{name} is not finite"
            for update in updates:
                held = {part: tensors[key].float() for part, key in update.keys.items()}
                if len(updates) == 1 and held.keys() == {"up", "down"}:
                    alpha = tensors[update.alpha].item() if update.alpha else 1.0
                    added = 0.5 * update.scale * alpha * (held["up"] @ held["down"])
                    wanted = STATE[name] + added
                    torch.testing.assert_close(parameters[name].detach(), wanted, rtol=1e-3, atol=1e-4)

    for data in BASES:  # whole ones; and nothing is imported any more when memory is looked at
        attempt(data)
    survive(BASES, batch, attempt, head=min(int.from_bytes(one[:8], "little") for one in BASES) + 8)
