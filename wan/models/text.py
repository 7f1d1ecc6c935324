"""Prompts -> token ids, as the official text encoder wants them. Imports no torch."""

from __future__ import annotations

import html
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from wan.errors import SwanError, printable
from wan.files import read_json

PAD_ID = 0
# Encoders have some rows more than their tokenizer has tokens (UMT5 84, 384 more than its spiece.model): many more are
# the table of another tokenizer.
_MANY_UNUSED, _SOME_UNUSED = 1000, 512


def clean_text(text: str) -> str:
    """Repair mojibake and full-width forms, resolve HTML entities (twice), collapse white space.

    The cleaning of the official tokenizer, `whitespace` mode. It applies to negative prompts as well.
    """
    import ftfy
    import regex

    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return regex.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """Clean, tokenize, append the end token, pad on the right with id 0."""

    def __init__(self, tokenizer):
        """`tokenizer`: a `tokenizers.Tokenizer` whose post-processor appends the end token."""
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], text_len: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and mask, `len(texts)` rows of `text_len` each. A long text loses its tail, not its end token."""
        self._tokenizer.enable_truncation(text_len)
        encodings = [self._tokenizer.encode(clean_text(text)) for text in texts]
        lengths = [len(encoding.ids) for encoding in encodings]
        pads = [text_len - length for length in lengths]
        ids = [encoding.ids + [PAD_ID] * pad for encoding, pad in zip(encodings, pads)]
        return ids, [[1] * length + [0] * pad for length, pad in zip(lengths, pads)]


def load_tokenizer(folder: str | Path) -> PromptTokenizer:
    """The tokenizer in a checkpoint folder: its `tokenizer.json`, else its `spiece.model` converted.

    Raises SwanError if the folder has neither or the file cannot be read. Nothing is downloaded.
    """
    folder = Path(folder)
    from tokenizers import Tokenizer

    for name, read in (("tokenizer.json", _read_json), ("spiece.model", _read_spiece)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tokenizer: Tokenizer = read(path)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise SwanError(f"{path}: not a usable tokenizer ({' '.join(str(error).split())[:200]})") from error
        tokenizer.no_padding()
        return PromptTokenizer(tokenizer)
    raise SwanError(f"{folder}: no tokenizer in it (looked for tokenizer.json and spiece.model)")


def count_tokens(folder: str | Path) -> int | None:
    """One more than the largest id of the tokenizer in a folder, by its file alone; None where there is none that can
    be read, which `load_tokenizer` says."""
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            told = read_json(folder / "tokenizer.json")
            vocab, added = told["model"]["vocab"], [token["id"] for token in told.get("added_tokens", ())]
            return max([len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values()), *added]) + 1
        pieces = sum(field == 1 for field, _ in _fields((folder / "spiece.model").read_bytes()))
        return pieces + _tokenizer_config(folder).get("extra_ids", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SwanError):
        return None


def check_tokenizer(folder: str | Path, rows: int) -> list[str]:
    """`check_vocabulary` for the tokenizer in a folder, which is not made: warnings, as lines to show."""
    tokens = count_tokens(folder)
    note = None if tokens is None else check_vocabulary(folder, tokens, rows)
    return [note] if note else []


def check_vocabulary(path: str | Path, tokens: int, rows: int) -> str | None:
    """Whether the tokenizer in `path` may belong to an encoder with so many rows of embeddings.

    Raises SwanError, one line, if not; a warning where it hardly does.
    """
    told = f"{printable(path)}: has {tokens} tokens, the text encoder {rows}"
    if tokens > rows or (rows > 2 * tokens and rows - tokens >= _MANY_UNUSED):
        raise SwanError(f"{told}: it is the tokenizer of another encoder")
    unused = f"warning: {told}: {rows - tokens} rows are never used; is it the right tokenizer?"
    return unused if rows - tokens > max(_SOME_UNUSED, rows // 100) else None


def _read_json(path: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))


def _read_spiece(path: Path):
    """Unigram SentencePiece model -> fast tokenizer, by the rules transformers 4 converts T5 with.

    transformers 5 converts differently (no white-space rule, the id of <unk> fixed to 2), so ids would depend on the
    installed version. Like both, this has no byte fallback: what is not in the vocabulary becomes <unk>.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    pieces, unk_id, charsmap = parse_spiece(path.read_bytes())
    config = _tokenizer_config(path.parent)
    extra = [f"<extra_id_{index}>" for index in reversed(range(config.get("extra_ids", 0)))]
    vocab = [(piece, score) for piece, score, _ in pieces] + [(piece, 0.0) for piece in extra]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=unk_id, byte_fallback=False))
    special = [piece for piece, _, kind in pieces if kind == _CONTROL] + extra
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece, _, kind in pieces if kind == _USER_DEFINED])
    steps = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), *steps] if charsmap else steps)
    scheme = "always" if config.get("legacy", True) else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    end_id = tokenizer.token_to_id("</s>")
    if end_id is None:
        raise ValueError("no </s> in its vocabulary")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end_id)])
    return tokenizer


def _tokenizer_config(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if os.path.lexists(path) else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return config


# A SentencePiece model is a protocol buffer. Only a few fields matter here, so protobuf need not be installed.
# Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
_UNIGRAM, _CONTROL, _USER_DEFINED = 1, 3, 4


def parse_spiece(data: bytes) -> tuple[list[tuple[str, float, int]], int, bytes]:
    """(piece, score, type) in order of id, the id of <unk>, and the table of the character normaliser."""
    pieces, unk_id, charsmap = [], 0, b""
    for field, value in _fields(data):
        if field == 1:
            piece, score, kind = "", 0.0, 1
            for inner, content in _fields(value):
                if inner == 1:
                    piece = content.decode("utf-8")
                elif inner == 2:
                    score = struct.unpack("<f", content)[0]
                elif inner == 3:
                    kind = content
            pieces.append((piece, score, kind))
        elif field == 2:
            trainer = dict(_fields(value))
            unk_id = trainer.get(40, 0)
            if trainer.get(3, _UNIGRAM) != _UNIGRAM:
                raise ValueError("not a unigram model")
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    if not pieces:
        raise ValueError("no vocabulary in it")
    return pieces, unk_id, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: an int for a varint, else the raw bytes."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
        else:
            if kind == 2:
                size, position = _varint(data, position)
            else:
                size = {1: 8, 5: 4}[kind]
            value = data[position : position + size]
            position += size
            if position > end:
                raise ValueError("the file is truncated")
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise ValueError("the file is truncated")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
