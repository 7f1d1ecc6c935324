"""The files of mlx-video: their names and order of axes. Its folder is known to `locate`.

Its transformer numbers some layers otherwise and folds the patch embedding, its text encoder has official names but
one, and the kernels of its VAEs have their input channels last. That of Wan2.2 also has names of its own, and gains of
norms without axes of 1. What this reads, and writes back, has official names and shapes outside.

Source: https://github.com/Blaizzy/mlx-video (convert.py, vae22.py)
"""

from __future__ import annotations

import torch

from wan.quant.ggml import GGMLType
from wan.quant.packed import PackedTensor
from wan.quant.schemes import Scheme
from wan.weights.containers.mapped import Extent
from wan.weights.names import Dialect, Table
from wan.weights.source import Source, Span, TensorInfo

_DIT: Table = {
    "patch_embedding_proj": "patch_embedding",
    "text_embedding_0": "text_embedding.0",
    "text_embedding_1": "text_embedding.2",
    "time_embedding_0": "time_embedding.0",
    "time_embedding_1": "time_embedding.2",
    "time_projection": "time_projection.1",
    "blocks.{a}.ffn.fc1": "blocks.{a}.ffn.0",
    "blocks.{a}.ffn.fc2": "blocks.{a}.ffn.2",
}
_T5: Table = {"blocks.{a}.ffn.gate_proj": "blocks.{a}.ffn.gate.0"}
_KERNELS = {  # these are no modules there
    f"{theirs}_{leaf}": f"{ours}.{leaf}"
    for theirs, ours in (("resample", "resample.1"), ("to_qkv", "to_qkv"), ("proj", "proj"))
    for leaf in ("weight", "bias")
}
_VAE_22: Table = {
    f"{half}.{place}.{theirs}": f"{half}.{place}.{ours}"
    for half, stage in (("encoder", "downsamples"), ("decoder", "upsamples"))
    for place in (f"{stage}.{{a}}.{stage}.{{b}}", "middle.{a}")
    for theirs, ours in (_KERNELS | {f"residual.layer_{index}": f"residual.{index}" for index in (0, 2, 3, 6)}).items()
} | {f"{half}.head.layer_{index}": f"{half}.head.{index}" for half in ("encoder", "decoder") for index in (0, 2)}
_TO_OFFICIAL = {
    "dit": Dialect(r"^patch_embedding_proj\.", _DIT),
    "t5": Dialect(r"\.ffn\.gate_proj\.", _T5),
    "vae 2.2": Dialect(r"\.residual\.layer_\d\.", _VAE_22),
}
_TO_MLX = {
    component: Dialect.back(table)
    for component, table in (("dit", _DIT), ("t5", _T5), ("vae 2.2", _VAE_22), ("vae 2.1", {}))
}
_TABLES = ("freqs",)  # computed, not trained; saved along with a quantised transformer
_VAE_MARKER = "decoder.conv1.weight"  # [channels, 3, 3, 3, z]; officially [channels, z, 3, 3, 3]


class MlxSource(Source):
    """A file of mlx-video under official names, with the official order of axes.

    names: official name -> the file's. is_last: whether kernels have their input channels last.
    """

    def __init__(self, inner: Source, names: dict[str, str], is_last: bool = False):
        self._inner, self._names, self._is_last = inner, names, is_last
        self.metadata = getattr(inner, "metadata", {})
        infos = {}
        for name, stored in names.items():
            info = inner.info(stored)
            shape = tuple(info.shape[axis] for axis in self._axes(name, info.shape))
            infos[name] = TensorInfo(shape, info.dtype)
        super().__init__(inner.paths, infos)

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        tensor = self._inner.read(self._names[name], rows)
        axes = self._axes(name, tensor.shape)
        return tensor if axes == [*range(tensor.ndim)] else tensor.permute(axes).contiguous()

    def extent(self, name: str) -> Extent | None:
        shape = self._inner.info(self._names[name]).shape
        return self._inner.extent(self._names[name]) if self._axes(name, shape) == [*range(len(shape))] else None

    def packed(self, name: str, mapped: bool = False, rows: Span | None = None) -> PackedTensor | None:
        return self._inner.packed(self._names[name], mapped, rows)

    def block_type(self, name: str) -> GGMLType | Scheme | None:
        return self._inner.block_type(self._names[name])

    def _axes(self, name: str, shape: tuple[int, ...]) -> list[int]:
        """Which axis of the file each of ours is: the channels of a kernel go to the second place."""
        axes = [*range(len(shape))]
        if self._is_last and len(shape) in (4, 5) and name.endswith(".weight"):
            axes.insert(1, axes.pop())
        return axes


def translate_mlx(source: Source) -> Source:
    """`source` under official names if it is a file of mlx-video; else itself."""
    keys = source.keys()
    for component, dialect in _TO_OFFICIAL.items():
        if any(map(dialect.marker.search, keys)):
            held = [name for name in keys if name not in _TABLES]
            names = {dialect.translate(name, {})[0]: name for name in held}
            if len(names) == len(held):
                return MlxSource(source, names, is_last=component == "vae 2.2")
            return source  # a mixture of layouts: `official_names` says which tensors clash
    shape = source.info(_VAE_MARKER).shape if _VAE_MARKER in keys else ()
    if len(shape) == 5 and shape[1:4] == (3, 3, 3) and shape[4] != 3:
        return MlxSource(source, {name: name for name in keys}, is_last=True)
    return source


def mlx_name(official: str, component: str) -> str:
    """What mlx-video calls a tensor of "dit", "t5", "vae 2.1" or "vae 2.2"."""
    return _TO_MLX[component].translate(official, {})[0]


def to_mlx(tensor: torch.Tensor, component: str, official: str) -> torch.Tensor:
    """A tensor of one of these in the shape in which mlx-video has it."""
    if component == "dit" and official == "patch_embedding.weight":
        return tensor.flatten(1)
    if component.startswith("vae") and official.endswith(".weight") and tensor.ndim in (4, 5):
        return tensor.movedim(1, -1).contiguous()
    if component == "vae 2.2" and official.endswith(".gamma"):
        return tensor.flatten()
    return tensor
