"""Names of ways to attend: those that have a back end here, and those that configurations of other programs have. No
torch.

An option takes several of them, `sage_attn3,flash_attn3,auto`: the first that can be used is, and a line tells why not
the ones before it.
"""

from __future__ import annotations

AUTO = "auto"
# All that they may need: see `wan.models.attention`.
BACK_END_NAMES = ("sdpa", "cudnn", "flash_attn2", "flash_attn3", "flash_attn4")
BACK_END_NAMES += ("sage_attn2", "sage_attn3", "sparge_attn")
_SPARSE = "leaves out part of the attention, and is not part of Swan"
_ELSEWHERE = "is for accelerators that are not supported"
# Name -> why there is no back end of that name.
WITHOUT_BACK_END = {
    **dict.fromkeys(("radial_attn", "svg_attn", "svg2_attn", "nbhd_attn", "nbhd_attn_flashinfer"), _SPARSE),
    **dict.fromkeys(("draft_attn", "dynamic_sparse_attn", "general_sparse_attn", "rainfusion_attn"), _SPARSE),
    **dict.fromkeys(("spas_sage_attn2", "spas_sage_attn3", "spas_flash_attn4", "sol_attn"), _SPARSE),
    **dict.fromkeys(("npu_flash_attn", "mlu_flash_attn", "mlu_sage_attn", "intel_xpu_cute_attn"), _ELSEWHERE),
    **dict.fromkeys(
        ("flash_attn_hygon_dcu", "flash_attn_enflame_gcu", "iluvatar_flash_attn", "aiter_attn"), _ELSEWHERE
    ),
}
ATTENTION_NAMES = (AUTO, *BACK_END_NAMES, *WITHOUT_BACK_END)
_LIGHTX2V = {"torch_sdpa": "sdpa", "sage_attn2_k_int8_v_fp8": "sage_attn2"}  # where a name is not ours


def split_names(asked: str) -> list[str]:
    """In the order of their being wanted."""
    return [name.strip() for name in asked.split(",")]


def lightx2v_attention(name: str) -> str | None:
    """The value of --attention for an attention type of a LightX2V configuration (`self_attn_1_type` and the like):
    that back end, or else, with a line that says so, the one that is chosen by itself. None for an unknown name."""
    ours = _LIGHTX2V.get(name, name)
    if ours not in ATTENTION_NAMES:
        return None
    return ours if ours in (AUTO, "sdpa") else f"{ours},{AUTO}"
