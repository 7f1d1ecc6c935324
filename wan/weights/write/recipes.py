"""Which ggml type each tensor gets when a checkpoint is written as GGUF. Imports no torch.

The recipes are those of the files that the community shares: the rules for architecture `wan` of city96's patch of
llama.cpp (tools/lcpp.patch in https://github.com/city96/ComfyUI-GGUF), and for the text encoder llama.cpp's rule that
its token table is stored in Q6_K. `tests/unit/test_export.py` holds the counts of known files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

SMALL_WEIGHTS = 1024  # tensors of no more weights than this are stored in F32


@dataclass(frozen=True)
class Recipe:
    """Types of the quantised weights under one name.

    file_type: llama.cpp's number for the mixture, `general.file_type`. base: of all that no other field names.
    v: of value projections. early_v: (type, n), of the first n of them. ffn_down: of the matrices that lead out of the
    feed-forward networks. table: of the token table of the text encoder.
    """

    file_type: int
    base: str
    v: str | None = None
    early_v: tuple[str, int] | None = None
    ffn_down: str | None = None
    table: str | None = None


RECIPES: dict[str, Recipe] = {
    "F32": Recipe(0, "F32"),
    "F16": Recipe(1, "F16"),
    "BF16": Recipe(32, "BF16"),
    "Q8_0": Recipe(7, "Q8_0"),
    "Q6_K": Recipe(18, "Q6_K"),
    "Q5_K_M": Recipe(17, "Q5_K", v="Q6_K", ffn_down="Q6_K", table="Q6_K"),
    "Q5_K_S": Recipe(16, "Q5_K", table="Q6_K"),
    "Q5_K": Recipe(16, "Q5_K"),
    "Q5_1": Recipe(9, "Q5_1", table="Q6_K"),
    "Q5_0": Recipe(8, "Q5_0", ffn_down="Q5_1", table="Q6_K"),
    "Q4_K_M": Recipe(15, "Q4_K", v="Q6_K", ffn_down="Q6_K", table="Q6_K"),
    "Q4_K_S": Recipe(14, "Q4_K", early_v=("Q5_K", 4), ffn_down="Q5_K", table="Q6_K"),
    "Q4_K": Recipe(14, "Q4_K"),
    "Q4_1": Recipe(3, "Q4_1", table="Q6_K"),
    "Q4_0": Recipe(2, "Q4_0", ffn_down="Q4_1", table="Q6_K"),
    "Q3_K_M": Recipe(12, "Q3_K", v="Q4_K", early_v=("Q5_K", 2), ffn_down="Q4_K", table="Q6_K"),
    "Q3_K_S": Recipe(11, "Q3_K", table="Q6_K"),
    "Q3_K": Recipe(11, "Q3_K"),
    "Q2_K": Recipe(10, "Q2_K", v="Q3_K", table="Q6_K"),
    "IQ4_NL": Recipe(25, "IQ4_NL", table="Q6_K"),
    "IQ4_XS": Recipe(30, "IQ4_XS", table="Q6_K"),
}


@dataclass(frozen=True)
class Layout:
    """What the tensor names of one architecture mean.

    quantised: names of the matrices that may be quantised. v, ffn_down, table: how the names of these roles (see
    `Recipe`) end. v_per_block: value projections in a block. keep_f32: whether all the rest is stored in F32.
    """

    architecture: str
    quantised: re.Pattern[str]
    v: str
    v_per_block: int
    ffn_down: str
    table: str | None
    keep_f32: bool


# The matrices of the transformer blocks. Embeddings, the head, and all that S2V and Animate add are kept.
WAN = Layout(
    architecture="wan",
    quantised=re.compile(r"(vace_)?blocks\.\d+\..+\.weight"),
    v=".v.weight",
    v_per_block=2,
    ffn_down=".ffn.2.weight",
    table=None,
    keep_f32=False,
)
T5 = Layout(
    architecture="t5encoder",
    quantised=re.compile(r"token_embd\.weight|enc\.blk\.\d+\.(attn_[qkvo]|ffn_(gate|up|down))\.weight"),
    v=".attn_v.weight",
    v_per_block=1,
    ffn_down=".ffn_down.weight",
    table="token_embd.weight",
    keep_f32=True,
)
LAYOUTS = {"dit": WAN, "t5": T5}


def tensor_type(recipe: Recipe, layout: Layout, name: str, shape: Sequence[int], source_bf16: bool) -> str:
    """The name of the ggml type for tensor `name` (as the file will spell it) of `shape`.

    source_bf16: whether its source is bfloat16; a kept matrix stays so, any other is stored in F16.
    """
    if recipe.base == "F32" or len(shape) in (1, 5) or math.prod(shape) <= SMALL_WEIGHTS:
        return "F32"
    if len(shape) == 2 and layout.quantised.fullmatch(name):
        return _quantised_type(recipe, layout, name)
    if layout.keep_f32 or not name.endswith(".weight"):  # the latter are parameters that are added or multiplied
        return "F32"
    if recipe.base in ("F16", "BF16"):
        return recipe.base
    return "BF16" if source_bf16 else "F16"


def _quantised_type(recipe: Recipe, layout: Layout, name: str) -> str:
    if name.endswith(layout.v):
        block = re.match(r"(?:blocks|enc\.blk)\.(\d+)\.", name)  # vace_blocks come after all of these
        if recipe.early_v and block and int(block[1]) * layout.v_per_block < recipe.early_v[1]:
            return recipe.early_v[0]
        return recipe.v or recipe.base
    if name.endswith(layout.ffn_down):
        return recipe.ffn_down or recipe.base
    if layout.table and name.endswith(layout.table):
        return recipe.table or recipe.base
    return recipe.base
