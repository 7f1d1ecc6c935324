"""`python tests/ops/compile_kernels.py 90`: compiles all kernels for a compute capability; what each takes, as JSON."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wan.models.ops import triton as ops
from wan.quant import triton as quant
from wan.quant.ggml import BY_NAME

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8"}
NAMES |= {torch.float8_e4m3fn: "fp8e4nv"}


class Compiler:
    """Stands for a kernel: what is launched is compiled, for the types that it is launched with."""

    def __init__(self, kernel, name, capability, found):
        self.kernel, self.name, self.capability, self.found = kernel, name, capability, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, enable_fp_fusion=True, **named):
        values = dict(zip(self.kernel.arg_names, args)) | named
        constants = {key: one for key, one in values.items() if one is None or self._is_constant(key)}
        types = {key: "constexpr" if key in constants else _type(one) for key, one in values.items()}
        aligned = {
            (at,): [["tt.divisibility", 16]]
            for at, key in enumerate(self.kernel.arg_names)
            if types[key].startswith("*") or (key.endswith("stride") and types[key] == "i32")
        }
        made = triton.compile(
            ASTSource(self.kernel, {key: types[key] for key in self.kernel.arg_names}, constants, aligned),
            target=GPUTarget("cuda", self.capability, 32),
            options={"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout).groups()
        self.found[f"{self.name} {len(self.found)}"] = {
            "registers": int(registers),
            "spilled_bytes": int(stack),
            "reads_of_16_bytes": len(re.findall(r"ld\.global[^ ]*v4\.b32", made.asm["ptx"])),
        }

    def _is_constant(self, key):
        return next(one.is_constexpr for one in self.kernel.params if one.name == key)


def _type(value):
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def main(capability):
    found = {}
    for module, names in (
        (ops, ("_residual_norm", "_rms_rope", "_position_norm")),
        (quant, ("_blocks", "_rows", "_tokens")),
    ):
        for name in names:
            setattr(module, name, Compiler(getattr(module, name), name.strip("_"), capability, found))
    x, rows = torch.empty(1, 8, 5120, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int32)
    factor, weight = torch.empty(2, 5120), torch.empty(5120, dtype=torch.bfloat16)
    ops._norm(x, factor, factor, None, True, 1e-6)
    ops._gated_add(x, x, factor, rows)
    ops._gated_add_norm(x, x, factor, weight[None], weight[None], rows, False, 1e-6)
    ops._gated_add_norm(x, x, None, factor, factor, rows, True, 1e-6)
    ops._norm_rope_(x, weight, torch.empty(8, 128), 1e-6)
    ops._norm_rope_(x[..., :1536].contiguous(), weight[:1536], None, 1e-6)
    for width in (96, 384):
        picture = torch.empty(1, 1, 4, 4, width)
        ops._rms_norm_(picture, picture[0, 0, 0, 0], torch.empty_like(picture), True)
    for name in quant._TYPES:
        kind = BY_NAME[name]
        blocks = torch.empty(4, kind.block_bytes, dtype=torch.uint8)
        quant.dequantize_blocks_(blocks, name, torch.empty(4, kind.block_weights, dtype=torch.bfloat16))
    codes, scales = torch.empty(4, 5120, dtype=torch.uint8), torch.empty(4, 80)
    for kind, bits, offsets in (
        ("float8_e4m3fn", 8, None),
        ("float8_e5m2", 8, None),
        ("int8", 8, None),
        ("uint8", 4, scales),
    ):
        quant.dequantize_rows_(codes, scales, offsets, kind, bits, 64, x[0, :4])
    quant.quantize_tokens(x[0], "int8")
    quant._tokens.capability = max(capability, 89)  # the first whose floats of 8 bits are these
    quant.quantize_tokens(torch.empty(4, 13824, dtype=torch.bfloat16), "fp8")
    print(json.dumps(found))


main(int(sys.argv[1]))
