"""UMT5 and tokenizer cases: prompt cleaning, token ids, encoder output."""

from __future__ import annotations

import re

import torch

from tests.golden.cases import Case, MemorySource
from tests.golden.checks import Check, close, exact

TOLERANCE = 1e-4


def matches_t5(case: Case) -> bool:
    return {"vocab", "num_buckets", "dim_attn"}.issubset(case.config)


def matches_cleaning(case: Case) -> bool:
    return "pairs" in case.meta


def matches_tokenizer(case: Case) -> bool:
    return "samples" in case.meta


def run_t5(case: Case) -> list[Check]:
    from wan.models.encoders import load_text_encoder

    args, stored = case.meta["args"], case.tensors
    encoder = load_text_encoder(
        MemorySource(case.group("weights")), case.folder / args["tokenizer"], text_len=args["text_len"]
    )
    checks = []
    if "inputs/ids" in stored:
        ids, mask = stored["inputs/ids"], stored["inputs/mask"]
        context = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        valid = mask.bool()  # rows of padding are computed by the reference, and mean nothing
        checks.append(close("context", context[valid], stored["outputs/context"][valid], TOLERANCE))
    if "inputs/text_ids" in stored:
        ids, mask = encoder.tokenizer(args["texts"], args["text_len"])
        checks += [
            exact("text_ids", torch.tensor(ids), stored["inputs/text_ids"]),
            exact("text_mask", torch.tensor(mask), stored["inputs/text_mask"]),
        ]
    for index, text in enumerate(args["texts"]):
        key = f"text_context_{index}"
        checks.append(close(key, encoder([text])[0], stored[f"outputs/{key}"], TOLERANCE))
    together = encoder(args["texts"])
    checks += [
        close(f"text_context_{index} in a batch", context, stored[f"outputs/text_context_{index}"], TOLERANCE)
        for index, context in enumerate(together)
    ]
    return checks


def run_cleaning(case: Case) -> list[Check]:
    from wan.models.text import clean_text

    pairs = case.meta["pairs"] + case.meta.get("negative_prompts", [])
    return [exact(f"pair {index}", clean_text(pair["raw"]), pair["cleaned"]) for index, pair in enumerate(pairs)]


def run_tokenizer(case: Case) -> list[Check]:
    from wan.models.text import clean_text, load_tokenizer

    tokenizer = load_tokenizer(case.folder)
    checks = []
    for index, sample in enumerate(case.meta["samples"]):
        prompt = sample["prompt"]
        checks.append(exact(f"cleaned {index}", clean_text(prompt), sample["cleaned"]))
        wanted = sample["ids_hf_fast"]
        ids, mask = tokenizer([prompt], len(wanted) + 8)
        checks.append(exact(f"ids {index}", ids[0][: sum(mask[0])], wanted))
        for key in sample:
            padded = re.fullmatch(r"ids_seq(\d+)", key)
            if padded:
                ids, mask = tokenizer([prompt], int(padded[1]))
                checks.append(exact(f"{key} {index}", ids[0], sample[key]))
                checks.append(exact(f"mask_seq{padded[1]} {index}", mask[0], sample[f"mask_seq{padded[1]}"]))
    return checks
