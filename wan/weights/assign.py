"""Fill a model that was built on the meta device, one tensor after the other; threads read ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from operator import mul
from typing import Any, Protocol

import torch
from torch import nn

from wan.distributed.fsdp import own_rows, with_rows
from wan.errors import SwanError
from wan.quant.blocks import UNPACK
from wan.quant.ggml import GGMLType
from wan.quant.linear import QuantEmbedding, QuantLinear
from wan.quant.packed import PackedTensor
from wan.quant.schemes import Scheme
from wan.quant.wide import is_narrow, keep_narrow
from wan.weights.containers.mapped import Arriving, Extent, Guard, guard_uses
from wan.weights.containers.opened import READERS
from wan.weights.in_turn import in_turn
from wan.weights.infer import looks_like, our_names, tensor_info
from wan.weights.names import Rows
from wan.weights.scaled import check_scales
from wan.weights.source import Source, Span


@dataclass(frozen=True)
class _Slot:
    """A tensor to fill. aliases: its names in the model (several if tied); stored: in the file; packed: it stays so."""

    aliases: list[str]
    stored: str | Rows
    dtype: torch.dtype | None
    packed: bool


_Read = tuple[_Slot, torch.device, "torch.Tensor | PackedTensor | None", "Guard | None"]
Change = Callable[[str, str | Rows, Span | None, torch.Tensor | PackedTensor], torch.Tensor | None]


class Upload(Protocol):
    """What `memory.upload` is for whoever fills a model. kind: of the devices that it brings weights to."""

    kind: str

    def bring(
        self, size_bytes: int, read: Callable[[int, torch.Tensor], bool], unit_bytes: int = 1
    ) -> torch.Tensor | None: ...


Place = torch.device | str | Callable[[str], torch.device]  # or the device of each parameter, by its name


def load_weights(
    model: nn.Module,
    source: Source,
    component: str,
    *,
    device: Place = "cpu",
    dtype: torch.dtype | None = None,
    kept: torch.dtype | None = None,
    stream: bool = False,
    shard: Callable[[nn.Module], None] | None = None,
    upload: Upload | None = None,
) -> nn.Module:
    """`ModelWeights(...).fill(device)`: the parameters and persistent buffers of `model`. Returns `model`."""
    weights = ModelWeights(model, source, component, dtype=dtype, kept=kept, stream=stream, shard=shard)
    return weights.fill(device, upload=upload)


class ModelWeights:
    """The weights of a model, built on the meta device, in a file: each by its name in the model and as it has it.

    component: "dit", "vae", "t5", "clip" or "wav2vec". Parameters become `dtype` (None: as in the file),
    except where the model has a method `keep_fp32(name) -> bool` that says True. kept: the type of matrices that are
    not quantised where it is narrower than `dtype`, which is fp32 then: layers widen them, see `quant.wide`. Buffers
    keep their own dtype, and buffers that are not in files must hold their values already (build them with
    device="cpu"). Quantised tensors are dequantised; with `stream`, those of linear layers and embeddings stay packed
    and the layers become QuantLinear and QuantEmbedding. shard: called with the model, still on the meta device, to
    share its parameters out among ranks, see `distributed.fsdp`; each rank then reads its own rows.

    Making one checks everything and reads nothing. Raises SwanError, one line, naming the tensors that are missing,
    unexpected or mis-shaped.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        component: str,
        *,
        dtype: torch.dtype | None = None,
        kept: torch.dtype | None = None,
        stream: bool = False,
        shard: Callable[[nn.Module], None] | None = None,
    ):
        names = our_names(source, component)
        groups = _slots(model, names)
        _check(model, groups, names, source)
        if kept is not None:
            keep_narrow(model, kept)
        self._model, self._source, self._is_sharded = model, source, shard is not None
        self._slots = [_prepare(model, aliases, names, source, dtype, stream) for aliases in groups]
        self._by_name = {alias: slot for slot in self._slots for alias in slot.aliases}
        if shard is not None:
            shard(model)

    def fill(
        self,
        device: Place,
        change: Change | None = None,
        upload: Upload | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> nn.Module:
        """Read the weights and freeze the model; on the meta device, leave them unread. Returns the model.

        Threads read ahead: beside the model are one weight as it is stored, or a few small ones (`in_turn`).
        change(name, place in the file, rows, what was read of them): the value of a weight that is not packed, where it
        is another. upload: how whole weights come to a GPU, see `memory.upload`. check: is called before each weight.
        """
        place = device if callable(device) else lambda name: torch.device(device)
        devices = [place(slot.aliases[0]) for slot in self._slots]
        extents = [self._extent(slot) if where.type == "cpu" else None for slot, where in zip(self._slots, devices)]
        with Arriving(one for one in extents if one) as arriving:
            for read in in_turn(self._jobs(devices, extents, arriving, upload), READERS):
                check()
                self._put(*read, change, upload)
                del read  # or it would be in memory until the next one is
            arriving.wait_for_all(check)
        _place_other_buffers(self._model, place, self._by_name)
        return self._model

    def _jobs(
        self,
        devices: Sequence[torch.device],
        extents: Sequence[Extent | None],
        arriving: Arriving,
        upload: Upload | None,
    ) -> Iterator[tuple[int, Callable[[], _Read]]]:
        """Of each weight that is to be read: its bytes in the file, and what reads it."""
        for slot, where, extent, (size_bytes, _) in zip(self._slots, devices, extents, self.reads(), strict=True):
            if upload is not None and where.type == upload.kind and self._is_uploaded(slot):
                # Read in its turn, by the thread that enqueues its copies.
                yield 0, partial(tuple, (slot, where, None, None))
            elif where.type != "meta":
                yield size_bytes, partial(self._read, slot, where, extent, arriving)

    def _read(self, slot: _Slot, where: torch.device, extent: Extent | None, arriving: Arriving) -> _Read:
        """A weight, or the rows of it that this rank keeps, as the file has them, or in the file."""
        old = _get(self._model, slot.aliases[0])
        shared = self._is_shared(old)
        rows = own_rows(old) if shared else None
        if slot.packed:
            stays = not shared and where.type == "cpu"
            if extent is not None:
                arriving.wait(extent)  # its blocks are looked at
            return slot, where, self._source.packed(slot.stored, mapped=stays, rows=rows), None
        if extent is not None:
            data, guard = extent.tensor(slot.dtype)
            return slot, where, data.view(self._source.info(slot.stored).shape), guard
        return slot, where, read_stored(self._source, slot.stored, tuple(old.shape), rows), None

    def _extent(self, slot: _Slot) -> Extent | None:
        """Where a weight of a model on a CPU can stay in its file: packed, or a whole matrix that the model has as the
        file has it, of a layer that can look before it is used."""
        path, _, leaf = slot.aliases[0].rpartition(".")
        if not isinstance(slot.stored, str) or self._is_shared(_get(self._model, slot.aliases[0])):
            return None
        if not slot.packed:
            is_matrix = leaf == "weight" and isinstance(_layer(self._model, path), (nn.Linear, nn.Embedding))
            is_as_stored = is_matrix and self._source.info(slot.stored).dtype == slot.dtype
            if not is_as_stored or self._source.block_type(slot.stored):
                return None
        extent = self._source.extent(slot.stored)
        return extent if extent and (slot.packed or extent.suits(slot.dtype)) else None

    def _is_uploaded(self, slot: _Slot) -> bool:
        """Whether it is a whole tensor that lies in one piece."""
        old, is_whole = _get(self._model, slot.aliases[0]), isinstance(slot.stored, str)
        return is_whole and not self._is_shared(old) and not isinstance(self._source.block_type(slot.stored), Scheme)

    def _bring(self, name: str, where: torch.device, upload: Upload) -> torch.Tensor | PackedTensor:
        """A whole weight as the file has it, on a GPU."""
        info, kind = self._source.info(name), self._source.block_type(name)
        count, unit = math.prod(info.shape), kind.block_bytes if kind else 1
        size_bytes = count // kind.block_weights * unit if kind else count * info.dtype.itemsize
        data = upload.bring(size_bytes, lambda first, out: self._source.read_into(name, out, first), unit)
        if data is None:
            return read_stored(self._source, name, info.shape, None).to(where)
        if kind is None:
            return data.view(info.dtype).view(info.shape)
        return PackedTensor(kind, info.shape, data.view(-1, unit))

    def _put(
        self,
        slot: _Slot,
        where: torch.device,
        stored: torch.Tensor | PackedTensor | None,
        guard: Guard | None,
        change: Change | None,
        upload: Upload | None,
    ) -> None:
        """Into the model, on the device: whatever is computed is computed there."""
        old = _get(self._model, slot.aliases[0])
        stored = self._bring(slot.stored, where, upload) if stored is None else stored
        if change and not slot.packed and isinstance(old, nn.Parameter):  # no buffer
            changed = change(slot.aliases[0], slot.stored, own_rows(old) if self._is_shared(old) else None, stored)
            stored, guard = (stored, guard) if changed is None else (changed, None)
        stored, layer = stored.to(where), _layer(self._model, slot.aliases[0].rpartition(".")[0])
        if guard is not None:
            guard_uses(layer, guard)
        if slot.packed:
            tensor = stored.blocks.view(-1, old.shape[-1])  # the file may have folded its rows
            layer.guard = stored.guard
        else:
            tensor = as_tensor(stored, slot.dtype).view(-1, *old.shape[1:]).to(slot.dtype)
        if self._is_shared(old):
            value = with_rows(old, tensor)
        else:
            value = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        for alias in slot.aliases:
            _set(self._model, alias, value)

    def _is_shared(self, old: torch.Tensor) -> bool:
        return self._is_sharded and isinstance(old, nn.Parameter)

    def reads(self) -> Iterator[tuple[int, int]]:
        """Of each weight, in the order in which `fill` reads them: bytes that are read, and what becomes of them."""
        for slot in self._slots:
            name = slot.stored if isinstance(slot.stored, str) else slot.stored.name
            info, kind, target = (
                self._source.info(name),
                self._source.block_type(name),
                _get(self._model, slot.aliases[0]),
            )
            count = math.prod(info.shape) if isinstance(slot.stored, str) else target.numel()
            if kind is None:
                yield count * info.dtype.itemsize, target.nbytes
            elif isinstance(kind, GGMLType):  # the file may have folded its rows
                yield count // kind.block_weights * kind.block_bytes, target.nbytes
            else:
                yield count // info.shape[-1] * kind.row_bytes(info.shape[-1]), target.nbytes

    def read(self, name: str, out: torch.Tensor) -> None:
        """A weight as the model has it, of a packed one its blocks, into memory of its type and shape on the CPU."""
        slot, source = self._by_name[name], self._source
        is_as_stored = slot.packed
        if not slot.packed and isinstance(slot.stored, str) and source.block_type(slot.stored) is None:
            is_as_stored = source.info(slot.stored).dtype == slot.dtype
        if is_as_stored and source.read_into(slot.stored, out):
            return
        if slot.packed:
            out.copy_(source.packed(slot.stored).blocks.view(out.shape))
        else:
            out.copy_(read_tensor(source, slot.stored, tuple(out.shape), None, slot.dtype))

    def stored(self, name: str) -> str | Rows:
        """Where the file has a weight."""
        return self._by_name[name].stored


def _prepare(
    model: nn.Module, aliases: list[str], names: dict[str, Any], source: Source, dtype: torch.dtype | None, stream: bool
) -> _Slot:
    """Gives a tensor the layer and the type that it will have; nothing is read."""
    name = next(alias for alias in aliases if alias in names)
    old, stored = _get(model, name), names[name]
    keeps_fp32 = getattr(model, "keep_fp32", lambda name: False)(name)
    is_quantised = source.block_type(stored if isinstance(stored, str) else stored.name) is not None
    block_type = source.block_type(stored) if isinstance(stored, str) else None
    row_bytes = _row_bytes(block_type, old.shape) if stream and not keeps_fp32 else None
    if row_bytes is not None:
        blocks = torch.empty(old.shape[0], row_bytes, dtype=torch.uint8, device="meta")
        layer = _packed_layer(model, name, PackedTensor(block_type, tuple(old.shape), blocks), dtype)
        if layer is not None:
            paths = [alias.rpartition(".")[0] for alias in aliases]
            for path in paths:
                _set(model, path, layer)
            return _Slot([f"{path}.blocks" for path in paths], stored, torch.uint8, packed=True)
    target = old.dtype
    if isinstance(old, nn.Parameter):
        if old.is_floating_point() and (is_quantised or not is_narrow(model, name)):
            target = torch.float32 if keeps_fp32 else dtype or tensor_info(source, stored).dtype
        # Not by empty_like, which on the meta device imports sympy: a third of a second.
        empty = nn.Parameter(torch.empty(old.shape, dtype=target, device="meta"), requires_grad=False)
        for alias in aliases:
            _set(model, alias, empty)
    return _Slot(aliases, stored, target, packed=False)


def _row_bytes(block_type: GGMLType | Scheme | None, shape: Sequence[int]) -> int | None:
    """Bytes of a packed row of a matrix; None for what is not packed, or no matrix, or folded across its blocks."""
    if block_type is None or len(shape) != 2:
        return None
    try:
        return block_type.row_bytes(shape[1])
    except ValueError:
        return None


def check_weights(model: nn.Module, source: Source, component: str) -> None:
    """The checks of `load_weights` alone: nothing is read. Raises SwanError, one line."""
    names = our_names(source, component)
    _check(model, _slots(model, names), names, source)


def _slots(model: nn.Module, names: Collection[str]) -> list[list[str]]:
    """Names of the tensors to fill; tied ones share a slot. names: what the file has; a buffer that is not in it keeps
    the values that it was built with."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in names or tensor.is_meta or isinstance(tensor, nn.Parameter):
            groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _layer(model: nn.Module, path: str) -> nn.Module:
    """As `get_submodule`, which looks so closely at each step that it took a sixth of a short run."""
    return reduce(lambda module, name: module._modules[name], path.split("."), model) if path else model


def _get(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(_layer(model, path), leaf)


def _set(model: nn.Module, name: str, value: nn.Module | torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(_layer(model, path), leaf, value)


def _packed_layer(model: nn.Module, name: str, weight: PackedTensor, dtype: torch.dtype | None) -> nn.Module | None:
    """The layer that computes with packed weights in place of the one that holds parameter `name`, if there is one."""
    path, _, leaf = name.rpartition(".")
    layer = _layer(model, path)
    is_quick = isinstance(weight.type, Scheme) or weight.type.name in UNPACK  # other types are slow to dequantise
    if leaf != "weight" or not is_quick:
        return None
    if isinstance(layer, nn.Linear):
        return QuantLinear(weight, layer.bias)
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(weight, dtype or torch.float32)
    return None


def read_tensor(
    source: Source, stored: str | Rows, shape: tuple[int, ...], rows: Span | None, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor of `shape`, or some of its rows; of a quantised one in `dtype`."""
    tensor = as_tensor(read_stored(source, stored, shape, rows), dtype)
    return tensor.reshape(shape if rows is None else (rows[1] - rows[0], *shape[1:]))


def read_stored(
    source: Source, stored: str | Rows, shape: tuple[int, ...], rows: Span | None
) -> torch.Tensor | PackedTensor:
    """The weights of a tensor of `shape`, or of some of its rows, as the file has them; it may have folded them."""
    name, first = (stored, 0) if isinstance(stored, str) else (stored.name, stored.index * shape[0])
    is_whole = isinstance(stored, str)
    wanted = rows
    if not is_whole:  # a part of a tensor that holds several
        wanted = (first, first + shape[0]) if rows is None else (first + rows[0], first + rows[1])
    elif rows is not None and source.info(name).shape != shape:  # folded: it has other rows than ours
        whole = as_tensor(read_stored(source, stored, shape, None), torch.float32)
        return whole.reshape(shape)[slice(*rows)].clone()
    packed = source.packed(name, rows=wanted)
    return source.read(name, wanted) if packed is None else packed


def as_tensor(stored: torch.Tensor | PackedTensor, dtype: torch.dtype) -> torch.Tensor:
    """What was read; of a quantised tensor in `dtype`."""
    return stored if isinstance(stored, torch.Tensor) else stored.dequantize(dtype)


def _check(model: nn.Module, slots: list[list[str]], names: dict[str, str | Rows], source: Source) -> None:
    known = {alias for aliases in slots for alias in aliases}
    missing = [aliases[0] for aliases in slots if not any(alias in names for alias in aliases)]
    unexpected = [name for name in names if name not in known]
    wrong = []
    for name in known & names.keys():
        info, slot = tensor_info(source, names[name]), _get(model, name)
        if not _fits(info.shape, slot.shape):
            wrong.append(f"{name} {list(info.shape)} for {list(slot.shape)}")
        elif slot.is_floating_point() and not info.dtype.is_floating_point:
            wrong.append(f"{name} {str(info.dtype).removeprefix('torch.')} for a float")
    problems = [_report("missing", missing), _report("unexpected", unexpected), _report("mis-shaped", sorted(wrong))]
    if any(problems):
        problem = "; ".join(filter(None, problems))
        looks = looks_like(source)
        raise SwanError(f"{source.describe()}: does not fit {type(model).__name__}: {problem}{looks}")
    check_scales(source)


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Equal up to axes of size 1, which some exporters drop, and to axes of a convolution, which some fold."""
    stored, slot = ([size for size in sizes if size != 1] for sizes in (shape, wanted))
    if stored == slot or len(wanted) < 4:
        return stored == slot
    # Folded: where an axis of the file ends, one of the slot ends as well.
    return math.prod(stored) == math.prod(slot) and set(accumulate(stored, mul)) <= set(accumulate(slot, mul))


def _report(problem: str, names: list[str], limit: int = 3) -> str:
    if not names:
        return ""
    return f"{len(names)} {problem} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"


def _place_other_buffers(model: nn.Module, place: Callable[[str], torch.device], filled: Collection[str]) -> None:
    """Move the buffers that are in no file, such as tables computed by the constructor."""
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{path}.{leaf}" if path else leaf
            if buffer is None or name in filled:
                continue
            if buffer.is_meta:
                raise RuntimeError(f"buffer {name} has no values: build it with device='cpu'")
            module._buffers[leaf] = buffer.to(place(name))
