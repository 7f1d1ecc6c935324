"""Trains the audio encoder of s2v-tiny, a wav2vec2 of 24 narrow layers: each of its states shall tell how loud it is.

Beside it there is a linear probe for every state, which is not kept.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Wav2Vec2Model

from tools.tiny.sound import levels, make_sound
from wan.audio import RATE, STRIDES
from wan.models.audio import audio_model
from wan.weights.infer import AUDIO_LAYERS

SHAPES = {"dim": 16, "dim_ffn": 32, "num_heads": 2, "conv_dim": 16, "position_width": 16, "position_groups": 4}
SECONDS, BATCH = 1.5, 16
HOP, SEEN = int(np.prod(STRIDES)), 400  # samples from step to step, and that one sees


def build() -> Wav2Vec2Model:
    return Wav2Vec2Model(audio_model(**SHAPES, num_layers=AUDIO_LAYERS - 1).config).eval()


def train(out: Path, steps: int, peak: float = 3e-3, seed: int = 0) -> None:
    """The encoder as transformers keeps it goes to the folder `wav2vec2` in `out`, and a log to `out`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build()
    probes = nn.Parameter(torch.zeros(AUDIO_LAYERS, SHAPES["dim"] + 1))
    optimizer = torch.optim.AdamW([*model.parameters(), probes], lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    start, total = time.time(), 0.0
    with (out / "train_audio.jsonl").open("w") as log:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * min(1, (steps - step) / (0.5 * steps))
            sounds = [make_sound(rng, SECONDS) for _ in range(BATCH)]
            heard = torch.from_numpy(np.stack([(one - one.mean()) / one.std() for one in sounds]))
            states = torch.stack(model(heard, output_hidden_states=True).hidden_states)
            times = (np.arange(states.shape[2]) * HOP + SEEN / 2) / RATE
            wanted = torch.from_numpy(np.stack([levels(one, times) for one in sounds])).float()
            told = torch.einsum("nbtd,nd->nbt", states, probes[:, 1:]) + probes[:, :1, None]
            loss = (told - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            if step % 50 == 49 or step == steps - 1:
                row = {"stage": "audio", "step": step + 1, "loss": round(total / (step % 50 + 1), 5)}
                by_state = (told - wanted).square().mean((1, 2))
                row |= {"worst_state": round(by_state.max().item(), 5), "seconds": round(time.time() - start)}
                print(json.dumps(row), file=log, flush=True)
                total = 0.0
    model.save_pretrained(out / "wav2vec2")
