"""CLIP image encoder cases: preprocessing, and the tokens before the last block."""

from __future__ import annotations

from tests.golden.cases import Case, MemorySource
from tests.golden.checks import Check, close

TOLERANCE = 1e-4


def matches(case: Case) -> bool:
    return {"vision_dim", "vision_layers", "vision_heads"}.issubset(case.config)


def run(case: Case) -> list[Check]:
    from wan.models.encoders import load_clip_encoder

    encoder = load_clip_encoder(MemorySource(case.group("weights")), num_heads=case.config["vision_heads"])
    images = {tag: case.tensors[f"inputs/image_{tag}"] for tag in case.tags("inputs/image_")}
    expected = case.group("outputs")
    checks = []
    for tag, image in images.items():
        checks.append(close(f"clip_context_{tag}", encoder([image]), expected[f"clip_context_{tag}"], TOLERANCE))
        if f"pixel_values_{tag}" in expected:
            pixels = encoder.preprocess([image])
            checks.append(close(f"pixel_values_{tag}", pixels, expected[f"pixel_values_{tag}"], TOLERANCE))
    if "clip_context_all" in expected:
        in_order = [images[tag] for tag in sorted(images, key=int)]
        checks.append(close("clip_context_all", encoder(in_order), expected["clip_context_all"], TOLERANCE))
    return checks
