"""python -m wan.convert as a user meets it: layouts, exit codes, one line on failure, no half-written file."""

import json
import os
import signal
import string
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.tiny_checkpoint import dit_state, shrunk, t5_state, write_checkpoint
from tests.unit.weight_helpers import DictSource
from wan.convert import find_weights, main, tokenizer_metadata
from wan.errors import SwanError, UsageError
from wan.weights.export import export_gguf
from wan.weights.source import open_source

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An official folder: transformer, VAE, T5 and tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), shrunk("t2v-1.3B"))


def convert(checkpoint, output, *args, type_name="Q8_0"):
    return main(["--type", type_name, "--checkpoint-dir", str(checkpoint), "--output", str(output), *args])


def fails(capsys, code, match, *args, **kwargs):
    """The run ends in `code` and one line that says `match`."""
    assert convert(*args, "--quiet", **kwargs) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and match in err


def command(*args):
    """The command line in a process of its own, in a folder of its own."""
    return [sys.executable, "-m", "wan.convert", *map(str, args)], {**os.environ, "PYTHONPATH": str(REPO)}


def test_help_is_quick_and_imports_no_torch():
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
    code += " from wan.convert import main; main(['--help'])"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert time.perf_counter() - started < 1
    assert done.returncode == 0 and done.stderr.strip() == "False"
    for word in ("Q4_K_M", "IQ4_XS", "--component", "uniform"):
        assert word in done.stdout


def test_report(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "out.gguf", type_name="q8_0") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert out.count("\n") == 1 and "100%" in err
    assert report["file"] == str(tmp_path / "out.gguf") and report["bytes"] == os.path.getsize(tmp_path / "out.gguf")
    assert (report["architecture"], report["type"]) == ("wan", "Q8_0")
    assert report["tensors"] == sum(report["types"].values()) and report["types"]["Q8_0"] == report["quantized"] == 2
    assert report["seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_quiet(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "out.gguf", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "args, match",
    [
        (["--type", "Q7_X"], "no such type; types: F32, F16"),
        (["--to", "onnx"], "invalid choice: 'onnx'"),
        (["--component", "vae"], "invalid choice: 'vae'"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--output", "out.safetensors"], "must end in .gguf"),
        (["--output", "/no/such/folder/out.gguf"], "no folder /no/such/folder"),
        (["--checkpoint-dir", "Wan-AI/Wan2.1-T2V-1.3B"], "download it first"),
        (["--tokenizer", "x"], "--tokenizer has no meaning"),
        (["--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_usage_errors(checkpoint, tmp_path, capsys, args, match):
    fails(capsys, 2, match, checkpoint, tmp_path / "out.gguf", *args)
    assert not list(tmp_path.iterdir())


def test_overwrite(checkpoint, tmp_path, capsys):
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    fails(capsys, 2, "exists; --overwrite replaces it", checkpoint, output)
    assert output.read_bytes() == b"old"
    assert convert(checkpoint, output, "--overwrite") == 0
    assert open_source(output).keys()


def test_the_input_is_not_overwritten(checkpoint, tmp_path, capsys):
    path, link = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert convert(checkpoint, path) == 0
    capsys.readouterr()
    link.symlink_to(path)
    before = path.read_bytes()
    for output in (path, link):
        fails(capsys, 2, "is the input", path, output, "--overwrite")
    assert path.read_bytes() == before


def test_quantising_twice_warns(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "a.gguf") == 0
    capsys.readouterr()
    assert convert(tmp_path / "a.gguf", tmp_path / "b.gguf", type_name="Q4_0") == 0
    assert "warning: the weights are Q8_0 already" in capsys.readouterr().err


def test_single_files(checkpoint, tmp_path, capsys):
    assert convert(checkpoint / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "t5.gguf") == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "t5encoder"
    assert "enc.blk.0.attn_rel_b.weight" in open_source(tmp_path / "t5.gguf").keys()
    fails(capsys, 1, "looks like a Wan2.1 VAE", checkpoint / "Wan2.1_VAE.pth", tmp_path / "vae.gguf")
    t5 = checkpoint / "models_t5_umt5-xxl-enc-bf16.pth"
    fails(capsys, 1, "holds a T5 encoder (vocabulary 256", t5, tmp_path / "x.gguf", "--component", "high")


def test_text_encoder_of_a_folder(checkpoint, tmp_path, capsys):
    assert convert(checkpoint, tmp_path / "t5.gguf", "--component", "t5") == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "t5encoder"
    fails(capsys, 2, "spiece.model", checkpoint, tmp_path / "x.gguf", "--component", "t5", "--tokenizer", str(tmp_path))


def test_two_experts(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "checkpoint", shrunk("t2v-A14B"))
    fails(capsys, 2, "choose with --component high or low", folder, tmp_path / "out.gguf")
    for name in ("high", "low"):
        assert convert(folder, tmp_path / f"{name}.gguf", "--component", name, type_name="F32") == 0
        expert = open_source(folder / f"{name}_noise_model")
        ours = open_source(tmp_path / f"{name}.gguf")
        key = "blocks.0.self_attn.q.weight"
        assert torch.equal(ours.read(key), expert.read(key).float())


def test_layouts(tmp_path):
    """Which file is taken from which folder."""

    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    def found(folder, component=None):
        return [str(path.relative_to(tmp_path)) for path in find_weights(tmp_path / folder, component)]

    write("official/diffusion_pytorch_model-00001-of-00002.safetensors", "official/Wan2.1_VAE.pth")
    write("official/diffusion_pytorch_model-00002-of-00002.safetensors", "official/models_t5_umt5-xxl-enc-bf16.pth")
    assert len(found("official")) == 2 and found("official", "t5") == ["official/models_t5_umt5-xxl-enc-bf16.pth"]
    write("official/diffusion_pytorch_model.safetensors.index.json")
    assert found("official", "dit") == ["official/diffusion_pytorch_model.safetensors.index.json"]

    parts = ["transformer/a.safetensors", "transformer_2/a.safetensors", "text_encoder/b.safetensors"]
    write("diffusers/transformer/a.safetensors", "diffusers/text_encoder/b.safetensors", "diffusers/vae/c.safetensors")
    assert found("diffusers") == ["diffusers/transformer/a.safetensors"]
    assert found("diffusers", "t5") == ["diffusers/text_encoder/b.safetensors"]
    write(*(f"diffusers2/{part}" for part in parts))
    assert found("diffusers2", "high") == ["diffusers2/transformer/a.safetensors"]
    assert found("diffusers2", "low") == ["diffusers2/transformer_2/a.safetensors"]
    with pytest.raises(UsageError, match="two experts"):
        find_weights(tmp_path / "diffusers2")
    with pytest.raises(SwanError, match="no weights for low; looked in it and for low_noise_model/ and transformer_2/"):
        find_weights(tmp_path / "diffusers", "low")

    write("comfy/wan.gguf")
    assert found("comfy") == ["comfy/wan.gguf"]


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory):
    """Takes some seconds to quantise by one thread."""
    spec = shrunk("t2v-1.3B")
    spec.dit.update(dim=512, ffn_dim=2048, num_heads=4, num_layers=6)
    path = tmp_path_factory.mktemp("slow") / "dit.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in dit_state(spec).items()}, path)
    return path


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_killed_half_way(slow_checkpoint, tmp_path, sent, code):
    output = tmp_path / "out.gguf"
    args, env = command("--type", "IQ4_XS", "--threads", 1, "--checkpoint-dir", slow_checkpoint, "--output", output)
    process = subprocess.Popen(args, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == ""
    assert not output.exists()
    if sent != signal.SIGKILL:
        assert err.splitlines()[-1] == "interrupted" and not list(tmp_path.iterdir())


# The tokenizer


def spiece_model():
    """A SentencePiece model, encoded by hand: (piece, score, type) in field 1, the normaliser's table in field 3."""

    def field(number, data):
        return bytes([number << 3 | 2]) + varint(len(data)) + data

    def varint(value):
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1)]
    pieces += [(letter, -3.0, 1) for letter in string.ascii_letters]
    data = b""
    for piece, score, kind in pieces:
        data += field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
    trainer = b"\x18\x01" + b"\xc0\x02\x02"  # unigram, unknown id 2
    return data + field(2, trainer) + field(3, field(2, b"\x01\x02\xff")), pieces


def test_tokenizer_inside(tmp_path):
    data, pieces = spiece_model()
    (tmp_path / "spiece.model").write_bytes(data)
    tokenizer = tokenizer_metadata(tmp_path / "spiece.model", 256)
    export_gguf(DictSource(t5_state(shrunk("t2v-1.3B"))), tmp_path / "a.gguf", "Q8_0", tokenizer=tokenizer)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 256 and tokens[:4] == ["<pad>", "</s>", "<unk>", "▁"] and tokens[-1] == "[PAD255]"
    assert fields["tokenizer.ggml.scores"].contents()[: len(pieces)] == [score for _, score, _ in pieces]
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:4] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN, gguf.TokenType.NORMAL]
    assert kinds[-1] == gguf.TokenType.UNUSED
    assert fields["tokenizer.ggml.precompiled_charsmap"].contents() == [1, 2, 255]
    wanted = {"model": "t5", "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 2, "add_eos_token": True}
    assert {key: fields[f"tokenizer.ggml.{key}"].contents() for key in wanted} == wanted

    export_gguf(open_source(tmp_path / "a.gguf"), tmp_path / "b.gguf", "Q4_K_M")  # it goes along
    again = gguf.GGUFReader(tmp_path / "b.gguf").fields
    for key in (key for key in fields if key.startswith("tokenizer.")):
        assert (again[key].contents(), again[key].types) == (fields[key].contents(), fields[key].types)


def test_bad_tokenizer(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(SwanError, match="not a usable tokenizer"):
        tokenizer_metadata(tmp_path / "spiece.model", 256)
    (tmp_path / "spiece.model").write_bytes(spiece_model()[0])
    with pytest.raises(SwanError, match="has 56 tokens, the text encoder 8"):
        tokenizer_metadata(tmp_path / "spiece.model", 8)


def test_a_tokenizer_beside_the_weights_is_taken_along(tmp_path, capsys):
    spec = shrunk("t2v-1.3B")
    (tmp_path / "text_encoder").mkdir()
    save_file(t5_state(spec), tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(spiece_model()[0])
    assert convert(tmp_path, tmp_path / "t5.gguf", "--component", "t5") == 0
    assert len(open_source(tmp_path / "t5.gguf").array("tokenizer.ggml.tokens")) == spec.text.vocab
