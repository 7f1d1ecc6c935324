"""GGUF files to read in tests: sound ones written by the `gguf` package, damaged ones put together byte by byte."""

import struct
from pathlib import Path

import gguf
import numpy as np
import torch

from tests.unit.tiny_checkpoint import dit_state, shrunk, t5_state
from wan.quant.ggml import BY_ID, BY_NAME, random_blocks

BLOCK_TYPES = [one.name for one in BY_ID.values() if one.torch_dtype is None]

T5_NAMES = {
    "token_embedding": "token_embd",
    "norm": "enc.output_norm",
    "norm1": "attn_norm",
    **{f"attn.{one}": f"attn_{one}" for one in "qkvo"},
    "pos_embedding.embedding": "attn_rel_b",
    "norm2": "ffn_norm",
    "ffn.gate.0": "ffn_gate",
    "ffn.fc1": "ffn_up",
    "ffn.fc2": "ffn_down",
}


def random_rows(name: str, rows: int, weights: int, seed: int = 0) -> np.ndarray:
    """Rows of valid blocks, as the writer takes them: uint8 [rows, bytes a row]."""
    one = BY_NAME[name]
    return random_blocks(one, rows * weights // one.block_weights, seed).view(rows, -1).numpy()


def write_gguf(path: Path, tensors: dict, architecture: str = "wan", add=None) -> Path:
    """Write `tensors`: name -> array, or (type name, rows of blocks). add: called with the writer, adds keys."""
    writer = gguf.GGUFWriter(str(path), architecture)
    if add:
        add(writer)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=gguf.GGMLQuantizationType[tensor[0]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(tensor: torch.Tensor, name: str) -> tuple[str, np.ndarray]:
    """A tensor as `write_gguf` takes it."""
    return name, gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[name])


def tiny_dit(path: Path) -> tuple[Path, dict]:
    """A whole Wan transformer and its configuration. The patch embedding is folded to four axes."""
    spec = shrunk("t2v-1.3B")
    spec.dit.update(in_dim=4, out_dim=4, dim=32, ffn_dim=32, text_len=8, num_layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = dit_state(spec)
    types = {"patch_embedding.weight": "F32", "head.head.weight": "BF16", "blocks.0.self_attn.q.weight": "Q8_0"}
    types |= {"blocks.0.ffn.2.weight": "Q5_1", "blocks.0.ffn.0.weight": "Q4_1"}
    tensors = {}
    for name, tensor in state.items():
        if tensor.dim() == 2:
            tensors[name] = quantised(tensor, types.get(name, "Q4_0"))
        else:
            tensors[name] = tensor.numpy().astype(np.float32 if tensor.dim() > 1 else np.float16)
    patch = state["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = patch.reshape(patch.shape[0], -1, *patch.shape[3:]).numpy()

    def add(writer):
        writer.add_quantization_version(2)
        writer.add_file_type(2)
        writer.add_custom_alignment(32)
        writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", list(patch.shape))

    return write_gguf(path, tensors, add=add), dict(spec.dit)


def tiny_t5(path: Path) -> Path:
    """A whole text encoder with a tokenizer of a few entries."""
    spec = shrunk("t2v-1.3B")
    spec.text.update(vocab=24, dim_ffn=32, num_buckets=4)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = t5_state(spec)
    tensors = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        block = "enc.blk.0." if module.startswith("blocks.0.") else ""
        ours = f"{block}{T5_NAMES[module.removeprefix('blocks.0.')]}.weight"
        fits = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        tensors[ours] = quantised(tensor, "Q8_0") if fits else tensor.numpy()

    def add(writer):
        writer.add_file_type(7)
        writer.add_uint32("t5encoder.block_count", 1)
        writer.add_float32("t5encoder.attention.layer_norm_rms_epsilon", 1e-6)
        writer.add_string("tokenizer.ggml.model", "t5")
        writer.add_array("tokenizer.ggml.tokens", [f"▁token{index}" for index in range(24)])
        writer.add_array("tokenizer.ggml.scores", [-float(index) for index in range(24)])
        writer.add_bool("tokenizer.ggml.add_eos_token", True)

    return write_gguf(path, tensors, "t5encoder", add)


# Byte by byte


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string; with another `length` than its own, where given."""
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value) if length is None else length) + value


def key(name: str | bytes, type_id: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", type_id) + payload


def u32(name: str, value: int) -> bytes:
    return key(name, 4, struct.pack("<I", value))


def string(name: str, value: str | bytes) -> bytes:
    return key(name, 8, text(value))


def array(name: str, type_id: int, count: int, payload: bytes) -> bytes:
    return key(name, 9, struct.pack("<IQ", type_id, count) + payload)


def tensor(name: str | bytes, ne: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, type_id, offset)


def raw_gguf(tensors: list[bytes], keys=(), data: bytes = b"", version: int = 3, counts=None, alignment: int = 32):
    """A file: counts are (tensors, keys), by default the true ones."""
    counts = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data
