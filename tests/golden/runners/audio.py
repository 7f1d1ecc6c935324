"""Audio encoder cases: normalised samples, hidden states, and features by the frames of clips."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.golden.cases import Case, MemorySource
from tests.golden.checks import Check, close, exact
from wan.audio import FEATURES_PER_S, clips_of, features_of, steps_of

TOLERANCE = 1e-4


def matches(case: Case) -> bool:
    return {"conv_kernel", "num_conv_pos_embeddings", "hidden_size"}.issubset(case.config)


def run(case: Case) -> list[Check]:
    from wan.models.audio import load_audio_encoder, loudness

    heads, expected = case.config["num_attention_heads"], case.group("outputs")
    encoder, checks = load_audio_encoder(MemorySource(case.group("weights")), num_heads=heads), []
    for tag in case.tags("inputs/waveform_"):
        samples = case.tensors[f"inputs/waveform_{tag}"]
        (mean, deviation), heard = loudness(samples), features_of(steps_of(len(samples)))
        values = (samples - mean) / deviation
        found = {
            f"input_values_head_{tag}": values[:64],
            f"hidden_states_{tag}": encoder.hidden_states(values),
            f"features_{tag}": encoder(samples, FEATURES_PER_S).transpose(1, 2),
        }
        for index, bucket in enumerate(case.meta["args"]["bucket_args"]):
            if bucket["m"]:  # neighbours of a frame, which S2V does not look at
                continue
            clips = clips_of(heard, bucket["batch_frames"], bucket["fps"])
            features = encoder(samples, bucket["fps"])
            features = F.pad(features, (0, clips * bucket["batch_frames"] - features.shape[-1]))
            found[f"bucket_fps_{tag}_{index}"] = features.permute(2, 0, 1)
            found[f"model_audio_input_{tag}_{index}"] = features[None]
            checks.append(exact(f"clips_{tag}_{index}", torch.tensor(clips), expected[f"num_repeat_{tag}_{index}"]))
        checks += [close(key, value, expected[key], TOLERANCE) for key, value in found.items() if key in expected]
    return checks
