import json
import subprocess
import sys

import pytest

from tests.unit.weight_helpers import golden
from wan.errors import SwanError
from wan.models.text import check_tokenizer, check_vocabulary, clean_text, count_tokens, load_tokenizer


def test_cleaning_matches_the_official_code():
    meta = golden("tokenizer_clean").meta
    for pair in meta["pairs"] + meta["negative_prompts"]:
        assert clean_text(pair["raw"]) == pair["cleaned"]


@pytest.mark.parametrize("name", ["tokenizer_tiny", "tokenizer_tiny_bytes"])
def test_ids_match_the_official_tokenizer(name):
    case = golden(name)
    tokenizer = load_tokenizer(case.folder)
    for sample in case.meta["samples"]:
        ids, mask = tokenizer([sample["prompt"]], 512)
        assert ids[0][: sum(mask[0])] == sample["ids_hf_fast"]
        assert tokenizer([sample["prompt"]], 32) == ([sample["ids_seq32"]], [sample["mask_seq32"]])


def test_truncation_keeps_the_end_token_and_padding_is_on_the_right():
    tokenizer = load_tokenizer(golden("tokenizer_tiny").folder)
    ids, mask = tokenizer(["a red kite above the dunes", ""], 4)
    assert ids[0][-1] == 1 and mask[0] == [1, 1, 1, 1]
    assert ids[1] == [1, 0, 0, 0] and mask[1] == [1, 0, 0, 0]


def test_tokenizer_json_is_preferred_and_its_own_padding_ignored(tmp_path):
    case = golden("tokenizer_tiny")
    converted = load_tokenizer(case.folder)._tokenizer
    converted.enable_padding(length=64)
    converted.enable_truncation(5)
    converted.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").write_bytes(b"not read")
    sample = case.meta["samples"][1]
    assert load_tokenizer(tmp_path)([sample["prompt"]], 32)[0] == [sample["ids_seq32"]]


def test_legacy_flag_and_extra_ids_of_the_tokenizer_config(tmp_path):
    case = golden("tokenizer_tiny")
    (tmp_path / "spiece.model").write_bytes((case.folder / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 2, "legacy": False}))
    ids, mask = load_tokenizer(tmp_path)(["<extra_id_0>"], 8)
    assert ids[0][:2] == [case.meta["vocab_size"] + 1, 1]


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff\x7f", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_tokenizer_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SwanError, match=f"{name}: not a usable tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(SwanError, match="looked for tokenizer.json and spiece.model"):
        load_tokenizer(tmp_path)


def test_import_is_cheap():
    code = (
        "import sys, wan.models.text, wan.weights.locate; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


@pytest.mark.parametrize("name", ["tokenizer_tiny", "tokenizer_tiny_bytes"])
def test_tokens_are_counted_as_they_are_loaded(tmp_path, name):
    folder = golden(name).folder
    loaded = load_tokenizer(folder)._tokenizer
    assert count_tokens(folder) == max(loaded.get_vocab().values()) + 1
    loaded.save(str(tmp_path / "tokenizer.json"))
    assert count_tokens(tmp_path) == count_tokens(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"vocab": 3}}', b'{"model": {"vocab": {"a": []}}}'])
def test_a_tokenizer_that_cannot_be_counted_is_left_to_whoever_loads_it(tmp_path, content):
    assert count_tokens(tmp_path) is None
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert count_tokens(tmp_path) is None and check_tokenizer(tmp_path, 3) == []


def test_a_tokenizer_of_another_encoder_is_refused():
    """UMT5 has 256384 rows for 256300 tokens (256000 in its spiece.model), mT5 250100 tokens, T5 32100."""
    folder = golden("tokenizer_tiny").folder
    tokens = count_tokens(folder)
    for rows in (tokens - 1, tokens * 2 + 1000, 256_384):
        with pytest.raises(SwanError, match=f"has {tokens} tokens, the text encoder {rows}: .* another encoder"):
            check_tokenizer(folder, rows)
    assert check_tokenizer(folder, tokens) == check_tokenizer(folder, tokens + 384) == []
    assert check_vocabulary("x", 256_000, 256_384) is None
    assert "6284 rows are never used" in check_vocabulary("x", 250_100, 256_384)
    with pytest.raises(SwanError):
        check_vocabulary("x", 32_100, 256_384)
