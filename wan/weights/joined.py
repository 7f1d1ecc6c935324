"""Matrices that a file has in two and the official one in one: keys and values of Animate's face, in diffusers."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from wan.errors import SwanError
from wan.quant.ggml import GGMLType
from wan.quant.packed import PackedTensor
from wan.quant.schemes import Scheme
from wan.weights.containers.mapped import Extent
from wan.weights.source import Source, Span, TensorInfo

_HALF = re.compile(r"(?P<start>(?:.*\.)?face_adapter\.\d+\.to_)k(?P<leaf>\.\w+)")


class JoinedSource(Source):
    """A source of which pairs of tensors are one, the second's rows behind those of the first."""

    def __init__(self, inner: Source, pairs: dict[str, tuple[str, str]]):
        self._inner, self._pairs = inner, pairs
        self.metadata = getattr(inner, "metadata", {})
        halves = {half for pair in pairs.values() for half in pair}
        infos = {name: inner.info(name) for name in inner.keys() if name not in halves}
        for name, pair in pairs.items():
            (rows, *rest), dtype = inner.info(pair[0]).shape, inner.info(pair[0]).dtype
            infos[name] = TensorInfo((2 * rows, *rest), dtype)
        super().__init__(inner.paths, infos)

    def parts(self) -> list[Source]:
        return self._inner.parts()

    def read(self, name: str, rows: Span | None = None) -> torch.Tensor:
        if name not in self._pairs:
            return self._inner.read(name, rows)
        return torch.cat([self._inner.read(half, span) for half, span in self._spans(name, rows)])

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> bool:
        return name not in self._pairs and self._inner.read_into(name, out, start)

    def extent(self, name: str) -> Extent | None:
        return None if name in self._pairs else self._inner.extent(name)

    def packed(self, name: str, mapped: bool = False, rows: Span | None = None) -> PackedTensor | None:
        if name not in self._pairs:
            return self._inner.packed(name, mapped, rows)
        halves = [self._inner.packed(half, rows=span) for half, span in self._spans(name, rows)]
        if halves[0] is None:
            return None
        count = sum(half.shape[0] for half in halves)
        blocks = torch.cat([half.blocks for half in halves])
        return replace(halves[0], shape=(count, *halves[0].shape[1:]), blocks=blocks, guard=None)

    def block_type(self, name: str) -> GGMLType | Scheme | None:
        return self._inner.block_type(self._pairs.get(name, (name,))[0])

    def _spans(self, name: str, rows: Span | None) -> list[tuple[str, Span]]:
        """The rows of each half that are wanted, of those of which some are."""
        half = self.info(name).shape[0] // 2
        first, last = rows or (0, 2 * half)
        spans = [(max(0, first - at), min(half, last - at)) for at in (0, half)]
        return [(one, span) for one, span in zip(self._pairs[name], spans, strict=True) if span[0] < span[1]]


def join_halves(source: Source) -> Source:
    """`source` with what is in two made one; itself if there is nothing. Raises SwanError for halves that differ."""
    pairs = {}
    for name in source.keys():
        if (match := _HALF.fullmatch(name)) and (other := f"{match['start']}v{match['leaf']}") in source.keys():
            if source.info(name) != source.info(other) or source.block_type(name) != source.block_type(other):
                raise SwanError(f"{source.describe()}: {name} and {other} must be alike")
            pairs[f"{match['start']}kv{match['leaf']}"] = (name, other)
    return JoinedSource(source, pairs) if pairs else source
