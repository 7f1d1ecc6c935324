"""The tiny text side: sentences about clips, and the sentencepiece model trained on them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tools.tiny.world import BACKGROUNDS, Clip, combinations

VOCAB_SIZE = 112

# The first is the sentence of `Clip.prompt`; the others teach that the words count, not their order.
TEMPLATES = (
    "a {color} {shape} moving {direction} on a {background} background",
    "A {color} {shape} moves {direction} on a {background} background.",
    "a {background} background with a {color} {shape} that moves {direction}",
    "{color} {shape}, {background} background, moving {direction}",
    "the {color} {shape} goes {direction} over {background}",
    "a {color} {shape} sliding {direction} on {background}",
    "video of a {color} {shape} moving {direction}, {background} background",
)


def sentence(clip: Clip, rng: random.Random) -> str:
    """A sentence that describes the clip; half of the time the plain one."""
    template = TEMPLATES[0] if rng.random() < 0.5 else rng.choice(TEMPLATES)
    return template.format(color=clip.color, shape=clip.shape, direction=clip.direction, background=clip.background)


def train_tokenizer(folder: Path) -> None:
    """Write `spiece.model` (unigram; pad 0, eos 1, unk 2) and `tokenizer_config.json` into `folder`."""
    import sentencepiece

    corpus = [
        template.format(color=color, shape=shape, direction=direction, background=background)
        for template in TEMPLATES
        for color, shape, direction in combinations()
        for background in BACKGROUNDS
    ]
    # Every letter, digit and mark on its own, so that no English text is all <unk>.
    corpus += list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-") * 4
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=VOCAB_SIZE,
        model_type="unigram",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        user_defined_symbols=[],
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    words = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = words | {"extra_ids": 0, "model_max_length": 512, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
