"""python -m wan.convert as a user meets it: layouts, exit codes, one line on failure, no half-written file."""

import json
import os
import shutil
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
from safetensors import safe_open
from safetensors.torch import save_file

from tests.dist.processes import Program
from tests.unit.tiny_checkpoint import dit_state, shrunk, t5_state, write_checkpoint
from tests.unit.weight_helpers import DictSource
from wan.convert import find_parts, find_weights, main, tokenizer_metadata
from wan.errors import SwanError, UsageError
from wan.files import atomic
from wan.tasks import load_task
from wan.weights.locate import locate
from wan.weights.source import open_source
from wan.weights.write.export import export_gguf

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


def test_help_imports_no_torch():
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr));"
    code += " from wan.convert import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
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


def test_of_a_link_the_file_that_it_leads_to_is_written(checkpoint, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link.gguf"
    link.symlink_to("disk/real.gguf")
    fails(capsys, 2, "exists; --overwrite replaces it", checkpoint, link)
    assert convert(checkpoint, link, "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(link)
    assert link.is_symlink() and open_source(tmp_path / "disk/real.gguf").keys()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.gguf"]
    gone = tmp_path / "gone.gguf"
    gone.symlink_to("gone/real.gguf")
    fails(capsys, 2, "is a link to a folder that is not there", checkpoint, gone, "--overwrite")
    text = tmp_path / "config.json"
    text.write_text("{}")
    (tmp_path / "text.gguf").symlink_to(text)
    fails(capsys, 2, "no .gguf file: not replaced", checkpoint, tmp_path / "text.gguf", "--overwrite")
    assert text.read_text() == "{}"


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
    with pytest.raises(SwanError, match="no weights for low in it"):
        find_weights(tmp_path / "diffusers", "low")

    write("comfy/wan.gguf")
    assert found("comfy") == ["comfy/wan.gguf"]

    # As generate.py has it: official names first, and a transformer of any name beside them.
    write(*(f"mixed/{name}" for name in ("my.safetensors", "Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")))
    write("mixed/models_t5_umt5-xxl-enc-bf16.pth", "mixed/models_t5_umt5-xxl-enc-fp8.safetensors")
    parts = find_parts(tmp_path / "mixed")
    official = {"dit": "my.safetensors", "vae": "Wan2.1_VAE.pth", "t5": "models_t5_umt5-xxl-enc-bf16.pth"}
    assert {part: [path.name for path in paths] for part, paths in parts.items()} == {
        part: [name] for part, name in official.items()
    }
    assert parts["t5"] == find_weights(tmp_path / "mixed", "t5") and parts["dit"] == find_weights(tmp_path / "mixed")
    write("mixed/other.safetensors")
    with pytest.raises(SwanError, match="cannot tell which file is the transformer"):
        find_parts(tmp_path / "mixed")


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory):
    """Takes some seconds to quantise by one thread."""
    spec = shrunk("t2v-1.3B")
    spec.dit.update(dim=512, ffn_dim=2048, num_heads=4, num_layers=6)
    path = tmp_path_factory.mktemp("slow") / "dit.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in dit_state(spec).items()}, path)
    return path


KILLED = [
    ("SIGTERM", 143, "terminated"),
    ("SIGHUP", 129, "terminated (hangup)"),
    ("SIGINT", 130, "interrupted"),
    ("SIGKILL", -9, None),
]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("sent, code, said", KILLED)
def test_killed_half_way(slow_checkpoint, tmp_path, sent, code, said):
    output = tmp_path / "out.gguf"
    args = ["--type", "IQ4_XS", "--threads", 1, "--checkpoint-dir", slow_checkpoint, "--output", output]
    out, err = Path(f"{tmp_path}.out"), Path(f"{tmp_path}.err")
    process = Program(["-m", "wan.convert", *args], tmp_path, dict(os.environ), out, err)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, getattr(signal, sent))
    process.wait(60)
    out, err = out.read_text(), err.read_text()
    assert process.returncode == code and out == ""
    assert not output.exists()
    if said:
        assert err.splitlines()[-1] == said and not list(tmp_path.iterdir())
        return
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".swan-")
    with atomic(tmp_path / "next"):  # whatever is written there next
        assert not left.exists()


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


def test_a_tokenizer_of_another_encoder_is_not_filled_up(tmp_path, capsys):
    spec = shrunk("t2v-1.3B")
    spec.text.vocab = 2000
    save_file(t5_state(spec), tmp_path / "models_t5.safetensors")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(spiece_model()[0])
    fails(capsys, 1, "has 56 tokens, the text encoder 2000", tmp_path / "models_t5.safetensors", tmp_path / "t5.gguf")
    assert not (tmp_path / "t5.gguf").exists()


def test_a_tokenizer_beside_the_weights_is_taken_along(tmp_path, capsys):
    spec = shrunk("t2v-1.3B")
    (tmp_path / "text_encoder").mkdir()
    save_file(t5_state(spec), tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(spiece_model()[0])
    assert convert(tmp_path, tmp_path / "t5.gguf", "--component", "t5") == 0
    assert len(open_source(tmp_path / "t5.gguf").array("tokenizer.ggml.tokens")) == spec.text.vocab


# Folders with quantised weights


def to_folder(checkpoint, output, *args):
    return main(["--checkpoint-dir", str(checkpoint), "--output-dir", str(output), "--quiet", *args])


def refuses(capsys, code, match, *args):
    """The run of these arguments ends in `code` and one line that says `match`."""
    assert main([*map(str, args), "--quiet"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and match in err


def test_folder_of_mlx_video(checkpoint, tmp_path, capsys):
    flags = ["--dtype", "float16", "--model-version", "auto", "--quantize", "--bits", "8", "--group-size", "32"]
    fails_by_width = to_folder(checkpoint, tmp_path / "out", *flags)  # rows of 48
    assert fails_by_width == 1 and "rows of 48 weights are no whole number of groups of 32" in capsys.readouterr().err
    spec = shrunk("t2v-1.3B")
    spec.dit.update(dim=64, ffn_dim=128)
    folder = write_checkpoint(tmp_path / "checkpoint", spec)
    assert to_folder(folder, tmp_path / "out", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["folder"], report["format"], report["quantized"]) == (str(tmp_path / "out"), "mlx", 20)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    weights = {"model.safetensors", "t5_encoder.safetensors", "vae.safetensors"}
    assert names == {*weights, "config.json", "google/umt5-xxl/tokenizer.json"}
    assert report["files"].keys() == weights
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8}
    assert (config["model_type"], config["model_version"], config["dual_model"], config["dim"]) == (
        "t2v",
        "2.1",
        False,
        64,
    )


def test_two_experts_in_one_folder(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "checkpoint", shrunk("t2v-A14B"))
    assert to_folder(folder, tmp_path / "int8", "--to", "int8") == 0
    assert to_folder(folder, tmp_path / "mlx") == 0
    written = [json.loads(line)["files"].keys() for line in capsys.readouterr().out.splitlines()]
    names = [f"{one}_noise_model/diffusion_pytorch_model.safetensors" for one in ("high", "low")]
    assert written[0] == {*names, "models_t5_umt5-xxl-enc-int8.safetensors", "Wan2.1_VAE.safetensors"}
    names = [f"{one}_noise_model.safetensors" for one in ("high", "low")]
    assert written[1] == {*names, "t5_encoder.safetensors", "vae.safetensors"}
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    assert (config["model_version"], config["dual_model"]) == ("2.2", True) and "quantization" not in config
    for part in ("high", "low", "t5"):  # of such a folder, parts are found again
        assert find_weights(tmp_path / "mlx", part)[0].parent == tmp_path / "mlx"
    assert to_folder(tmp_path / "mlx", tmp_path / "fp8", "--to", "fp8") == 0
    capsys.readouterr()
    flags = ("--checkpoint-dir", folder, "--output-dir", tmp_path / "x", "--model-version", "2.1")
    refuses(capsys, 2, "holds a model of Wan2.2", *flags)


def test_one_file_of_a_folder_form(checkpoint, tmp_path, capsys):
    assert to_folder(checkpoint / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "out", "--to", "fp8") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["models_t5_umt5-xxl-enc-fp8.safetensors"]
    capsys.readouterr()
    folder = ["--checkpoint-dir", str(tmp_path / "out/models_t5_umt5-xxl-enc-fp8.safetensors")]
    assert main([*folder, "--type", "Q8_0", "--output", str(tmp_path / "t5.gguf")]) == 0  # and from there to GGUF
    assert "the weights are fp8 already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, match",
    [
        (["--to", "fp8"], "--to fp8 needs --output-dir"),
        (["--to", "gguf"], "--to gguf needs --type and --output"),
        (["--to", "fp8", "--output-dir", "x", "--bits", "4"], "--bits has no meaning with --to fp8"),
        (["--to", "fp8", "--output-dir", "x", "--component", "t5"], "--component has no meaning with --to fp8"),
        (["--type", "Q8_0", "--output", "x.gguf", "--output-dir", "x"], "--output-dir has no meaning with --to gguf"),
        (["--output-dir", "x", "--bits", "4"], "--bits goes with --quantize"),
        (["--output-dir", "x", "--quantize", "--bits", "3"], "invalid choice: 3"),
        (["--output-dir", "/no/such/folder/x"], "no folder /no/such/folder"),
        (["--output-dir", "IN"], "holds the input"),
        (["--output-dir", "FULL"], "is not empty; --overwrite replaces it"),
        (["--output-dir", "FULL", "--overwrite"], "holds other things as well (thesis.doc)"),
    ],
)
def test_usage_errors_of_folders(checkpoint, tmp_path, capsys, args, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.doc").touch()
    places = {"IN": checkpoint, "FULL": tmp_path / "full"}
    refuses(capsys, 2, match, "--checkpoint-dir", checkpoint, *(places.get(one, one) for one in args))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.doc"]


FP8 = ("--to", "fp8", "--overwrite")


@pytest.fixture
def written(checkpoint, tmp_path, capsys):
    """A folder that the converter wrote."""
    assert to_folder(checkpoint, tmp_path / "out", "--to", "fp8") == 0
    capsys.readouterr()
    return tmp_path / "out"


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_what_the_converter_wrote_is_replaced(checkpoint, written, tmp_path):
    """By other forms too, after a move or a copy, and where nothing but a text encoder was written."""
    shutil.copytree(written, tmp_path / "copy")
    assert to_folder(checkpoint, tmp_path / "copy", "--to", "int8", "--overwrite") == 0
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert "models_t5_umt5-xxl-enc-int8.safetensors" in names and "models_t5_umt5-xxl-enc-fp8.safetensors" not in names
    t5 = checkpoint / "models_t5_umt5-xxl-enc-bf16.pth"
    for _ in range(2):
        assert to_folder(t5, tmp_path / "copy", *FP8) == 0
        assert [path.name for path in (tmp_path / "copy").iterdir()] == ["models_t5_umt5-xxl-enc-fp8.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out"]


def test_weights_saved_again_with_our_metadata_are_somebodys(checkpoint, written, capsys):
    path = written / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"mine": torch.ones(3)}, path, metadata=metadata)
    assert to_folder(checkpoint, written, *FP8) == 2
    assert "holds other things as well" in capsys.readouterr().err and open_source(path).keys() == ["mine"]


SOMEBODYS = {
    "a file beside the tokenizer": "google/mine/notes.txt",
    "a hidden file": ".gitattributes",
    "a file of macOS": "._config.json",
    "weights": "mine.safetensors",
    "weights under our name": "diffusion_pytorch_model.safetensors",
    "a config under our name": "config.json",
    "a tokenizer under our name": "google/umt5-xxl/tokenizer.json",
    "an empty folder": "google/empty/",
    "a link": "google/link",
    "a link in place of weights": "Wan2.1_VAE.safetensors",
}


@pytest.mark.parametrize("what", SOMEBODYS)
def test_what_somebody_put_there_is_not_deleted(checkpoint, written, tmp_path, capsys, what):
    path = written / SOMEBODYS[what]
    if what.startswith("a link"):
        if path.exists():
            shutil.move(path, tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    elif SOMEBODYS[what].endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        data = {"a config under our name": json.dumps({"mine": 1}).encode()}.get(what, b"precious")
        if what.startswith("weights"):
            save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
            data = (tmp_path / "a.safetensors").read_bytes()
        path.write_bytes(data)
    before, place = contents(tmp_path), path.relative_to(written)
    refuses(
        capsys,
        2,
        f"holds other things as well ({place}), which this converter did not write: not replaced",
        *("--checkpoint-dir", checkpoint, "--output-dir", written, *FP8),
    )
    assert contents(tmp_path) == before


def test_what_file_managers_leave_is_no_obstacle(checkpoint, written, capsys):
    for name in (".DS_Store", "Thumbs.db", "google/.DS_Store"):
        (written / name).parent.mkdir(exist_ok=True)
        (written / name).write_bytes(b"left")
    assert to_folder(checkpoint, written, *FP8) == 0
    assert not (written / ".DS_Store").exists()


def test_a_folder_with_our_names_that_we_did_not_write(checkpoint, tmp_path, capsys):
    """As a download has them."""
    folder = write_checkpoint(tmp_path / "download", shrunk("t2v-1.3B"))
    before = contents(tmp_path)
    refuses(capsys, 2, "did not write", "--checkpoint-dir", checkpoint, "--output-dir", folder, *FP8)
    assert contents(tmp_path) == before


def test_no_input_is_deleted(checkpoint, written, tmp_path, capsys):
    """Whatever leads to it: a link to a file or to a folder, and an output inside of what is copied."""
    before = contents(written)
    (tmp_path / "in").mkdir()
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        (tmp_path / "in" / name).symlink_to(written / name)
    (tmp_path / "link").symlink_to(written)
    for source, output in (
        (tmp_path / "in", written),
        (tmp_path / "link", written),
        (written, tmp_path / "link"),
        (written / "Wan2.1_VAE.safetensors", written),
    ):
        refuses(capsys, 2, "holds the input", "--checkpoint-dir", source, "--output-dir", output, *FP8)
    inside = written / "google" / "umt5-xxl" / "new"
    refuses(capsys, 2, "lies in the input", "--checkpoint-dir", written, "--output-dir", inside, *FP8)
    assert contents(written) == before


def test_of_a_link_the_folder_that_it_leads_to_is_written(checkpoint, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for _ in range(2):
        assert to_folder(checkpoint, tmp_path / "link", *FP8) == 0
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("moment", ["while writing", "between the renames", "at the second rename"])
def test_an_interrupted_replacement_loses_nothing(checkpoint, written, tmp_path, capsys, monkeypatch, moment):
    before, real, calls = contents(tmp_path), os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == 2 and moment != "while writing":
            raise KeyboardInterrupt if moment == "between the renames" else OSError(28, "no")
        return real(*args)

    def write_config(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    if moment == "while writing":
        monkeypatch.setattr(Path, "write_text", write_config)
    code = to_folder(checkpoint, written, *FP8)
    assert code == (1 if moment == "at the second rename" else 130) and contents(tmp_path) == before


def test_what_was_put_there_in_the_meantime_is_kept(checkpoint, written, tmp_path, capsys, monkeypatch):
    real = Path.write_text

    def write_config(path, *args, **kwargs):
        (written / "notes.txt").touch()
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_config)
    refuses(capsys, 2, "(notes.txt)", "--checkpoint-dir", checkpoint, "--output-dir", written, *FP8)
    assert (written / "notes.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_what_a_killed_converter_left_is_removed(checkpoint, tmp_path):
    import fcntl

    for name in ("killed", "running", "young"):
        (tmp_path / f".swan-{name}.tmp").mkdir()
    for name in ("killed", "running"):
        os.utime(tmp_path / f".swan-{name}.tmp", (1, 1))
    running = os.open(tmp_path / ".swan-running.tmp", os.O_RDONLY)
    fcntl.flock(running, fcntl.LOCK_EX)
    assert to_folder(checkpoint, tmp_path / "out", *FP8) == 0
    os.close(running)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".swan-running.tmp", ".swan-young.tmp", "out"]


@pytest.mark.parametrize("flags", [("--to", "fp8"), ("--quantize", "--bits", "4", "--group-size", "64")])
def test_video_from_a_folder(tmp_path, capsys, flags, monkeypatch):
    """The embedded model, quantised, through the command line: the same video with packed and dequantised weights."""
    from wan import cli
    from wan.tasks import embedded_checkpoint

    monkeypatch.chdir(tmp_path)
    source = embedded_checkpoint(load_task("t2v-tiny"))
    assert to_folder(source, tmp_path / "out", "--dtype", "float32", *flags) == 0
    capsys.readouterr()
    run = ["--task", "t2v-tiny", "--ckpt_dir", "out", "--prompt", "a red circle", "--seed", "1", "--sample_steps", "3"]
    assert cli.main([*run, "--dry_run"]) == 0
    capsys.readouterr()
    made = []
    for mode in ("stream", "resident"):
        assert cli.main([*run, "--gguf_mode", mode, "--save_file", f"{mode}.mp4"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["gguf_mode"]["model"] == mode
        made.append(report["sha256"])
    assert made[0] == made[1]
    gguf_file = tmp_path / "dit.gguf"
    gguf_file.write_bytes(b"GGUF")
    files = ["--dit", "out", "--gguf", str(gguf_file)]
    assert cli.main([*run, *files]) == 2
    assert "both name a file for the same component" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["i2v-tiny", "s2v-tiny"])
def test_a_folder_of_an_embedded_model_has_all_that_it_takes(task, tmp_path, capsys):
    """Which has its VAE and tokenizer from the folder of another one."""
    source = REPO / load_task(task).checkpoint
    assert main(["--to", "fp8", "--checkpoint-dir", str(source), "--output-dir", str(tmp_path / "f"), "--quiet"]) == 0
    found = locate(tmp_path / "f", load_task(task))
    assert all(path.is_relative_to(tmp_path / "f") for path in (found.tokenizer, *found.vae, *found.t5))
