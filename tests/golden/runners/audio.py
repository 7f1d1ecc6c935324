"""Audio encoder cases: normalised samples, hidden states, and features by the frames of clips."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.golden.cases import Case, MemorySource
from tests.golden.checks import Check, close, exact
from tests.unit.sound_helpers import features, write_sound
from wan.audio import FEATURES_PER_S, RATE, clips_of, features_of, open_audio, steps_of

TOLERANCE = 1e-4


def matches(case: Case) -> bool:
    return {"conv_kernel", "num_conv_pos_embeddings", "hidden_size"}.issubset(case.config)


def run(case: Case) -> list[Check]:
    with tempfile.TemporaryDirectory() as folder:
        return _run(case, Path(folder))


def _run(case: Case, folder: Path) -> list[Check]:
    from wan.models.audio import load_audio_encoder

    heads, expected = case.config["num_attention_heads"], case.group("outputs")
    encoder, checks = load_audio_encoder(MemorySource(case.group("weights")), num_heads=heads), []
    for tag in case.tags("inputs/waveform_"):
        samples = case.tensors[f"inputs/waveform_{tag}"]
        audio = open_audio(write_sound(folder / f"{tag}.wav", samples.numpy()[None], RATE, codec="pcm_f32le"))
        heard = features_of(steps_of(len(samples)))
        values = (samples - audio.level[0]) / audio.level[1]
        found = {
            f"input_values_head_{tag}": values[:64],
            f"hidden_states_{tag}": encoder.hidden_states(values),
            f"features_{tag}": features(encoder, audio, FEATURES_PER_S).transpose(1, 2),
        }
        for index, bucket in enumerate(case.meta["args"]["bucket_args"]):
            if bucket["m"]:  # neighbours of a frame, which S2V does not look at
                continue
            clips = clips_of(heard, bucket["batch_frames"], bucket["fps"])
            seen = features(encoder, audio, bucket["fps"])
            seen = F.pad(seen, (0, clips * bucket["batch_frames"] - seen.shape[-1]))
            found[f"bucket_fps_{tag}_{index}"] = seen.permute(2, 0, 1)
            found[f"model_audio_input_{tag}_{index}"] = seen[None]
            checks.append(exact(f"clips_{tag}_{index}", torch.tensor(clips), expected[f"num_repeat_{tag}_{index}"]))
        checks += [close(key, value, expected[key], TOLERANCE) for key, value in found.items() if key in expected]
    return checks
