"""LoRAs: small files of changes to a transformer, merged into its dense weights and put beside its packed ones.

`open_lora` checks a file against a model by names and shapes; `set_loras` brings a loaded model from the LoRAs that it
has to others, always from the checkpoint's own weights, so that nothing adds up and removal is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.distributed.fsdp import own_rows
from wan.errors import SwanError, printable
from wan.quant.linear import QuantLinear
from wan.quant.packed import PackedTensor
from wan.weights.assign import as_tensor, read_stored
from wan.weights.containers.opened import READERS
from wan.weights.in_turn import in_turn
from wan.weights.infer import our_names
from wan.weights.lora_file import AdapterConfig, Module, families, read_config, sort_keys
from wan.weights.lora_formulas import Branch, Dense, Dora, dora_gain, fits_dora, product, product_branch, rank
from wan.weights.names import Rows
from wan.weights.source import Source, Span, open_source

Shape = tuple[int, ...]
ReadBase = Callable[["Span | None"], Tensor]  # a parameter as the checkpoint has it, or some of its rows; fp32
_MAX_AXES = 8
_BAD_SHAPES = (RuntimeError, IndexError, ValueError, TypeError, OverflowError)  # what torch says of them
_WIDTHS = {1536: "a 1.3B", 3072: "a 5B", 5120: "a 14B"}
# Parts that stand alone -> the parameter of the module, and what they do to it. All others are factors of a product.
_SINGLE = {
    "diff": ("weight", "add"),
    "diff_b": ("bias", "add"),
    "diff_m": ("modulation", "add"),
    "w_norm": ("weight", "add"),
    "b_norm": ("bias", "add"),
    "up_bias": ("bias", "add"),
    "set": ("weight", "set"),
}


@dataclass(frozen=True)
class Update:
    """What some tensors of a file do to one parameter.

    kind: "product" (of factors), "add" (a tensor as it is) or "set" (the new value itself)
    keys: part -> key; of "add" and "set" the one part is "value"
    shape: of the parameter, or of half of it
    scale: of what is added; alpha: key of a number that it is multiplied by
    half: 0 or 1 where only the upper or the lower half of the parameter's rows is changed
    """

    kind: str
    source: Source
    keys: Mapping[str, str]
    shape: Shape
    scale: float = 1.0
    alpha: str | None = None
    half: int | None = None

    @property
    def target(self) -> Shape:
        """Of the parameter."""
        return self.shape if self.half is None else (2 * self.shape[0], *self.shape[1:])

    def broken(self) -> str | None:
        """The first of the tensors, or the alpha, that is not finite; None if all are."""
        for key in (*self.keys.values(), *([self.alpha] if self.alpha else [])):
            if not self.source.read(key).float().isfinite().all():
                return key
        return None

    def held_shape(self) -> Shape:
        """Of what the tensors make; by their headers. Raises KeyError, RuntimeError and such if they make nothing."""
        shapes = {part: self.source.info(key).shape for part, key in self.keys.items()}
        if self.kind != "product":
            return shapes["value"]
        return tuple(product({part: torch.empty(shape, device="meta") for part, shape in shapes.items()}).shape)

    def delta(self, base: ReadBase, rows: Span | None, device: torch.device) -> Tensor:
        """What strength 1 adds to the parameter, or to some of its rows; fp32."""
        if self.half is None:
            return self._delta(base, rows, device)
        rows, start = rows or (0, self.target[0]), self.half * self.shape[0]
        first, last = (min(max(row - start, 0), self.shape[0]) for row in rows)  # of the half's rows
        delta = torch.zeros(rows[1] - rows[0], *self.shape[1:], device=device)
        if first < last:
            of_half = lambda span: base((start, start + self.shape[0]) if span is None else _moved(span, start))  # noqa: E731
            delta[slice(*_moved((first, last), start - rows[0]))] = self._delta(of_half, (first, last), device)
        return delta

    def _delta(self, base: ReadBase, rows: Span | None, device: torch.device) -> Tensor:
        if self.kind != "product":
            value = _cut(_fitted(self._read("value", device), self.shape), rows)
            return value - base(rows) if self.kind == "set" else value * self._scale()
        if "dora" not in self.keys:
            return self._product(rows, device)
        magnitude = self._read("dora", device)
        by_row = magnitude.shape[0] == self.shape[0]
        span = rows if by_row else None  # the norm of a column needs all rows
        weight = base(span)
        changed = self._product(span, device).add_(weight)
        changed.mul_(dora_gain(changed, _cut(magnitude, span))).sub_(weight)
        return changed if by_row else _cut(changed, rows)

    def branch(self, base: ReadBase, strength: float, device: torch.device) -> Branch:
        """The same for a matrix that stays packed: what its layer adds to its output."""
        is_plain = self.keys.keys() == {"up", "down"}
        if self.kind != "product" or (self.half is not None and not is_plain):
            return Dense(matrix=self.delta(base, None, device) * strength)
        parts = {part: self._read(part, device) for part in self.keys}
        if self.half is not None:  # the other rows get zeros
            rows = len(parts["up"])
            parts["up"] = F.pad(parts["up"].flatten(1), (0, 0, self.half * rows, (1 - self.half) * rows))
        if "dora" not in self.keys:
            return product_branch(parts, self._scale() * strength)
        changed = self._product(None, device).add_(base(None))
        return Dora(product_branch(parts, self._scale()), dora_gain(changed, parts["dora"]), strength)

    def _product(self, rows: Span | None, device: torch.device) -> Tensor:
        if self.keys.keys() - {"dora"} == {"up", "down"}:  # by far the most frequent: only the rows that are needed
            up, down = self._read("up", device, rows), self._read("down", device)
            shape = (len(up), *self.shape[1:])
            return _fitted(product({"up": up, "down": down}), shape).mul_(self._scale())
        whole = product({part: self._read(part, device) for part in self.keys})
        return _cut(_fitted(whole, self.shape), rows).mul_(self._scale())

    def _scale(self) -> float:
        return self.scale * (self.source.read(self.alpha).item() if self.alpha else 1)

    def _read(self, part: str, device: torch.device, rows: Span | None = None) -> Tensor:
        return self.source.read(self.keys[part], rows).to(device, torch.float32)


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file that fits a model.

    updates: parameter, by its official name -> what changes it; notes: lines to show
    """

    path: str
    updates: Mapping[str, tuple[Update, ...]]
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> dict[str, Shape]:
        """The parameters that it changes, with their shapes."""
        return {name: updates[0].target for name, updates in self.updates.items()}

    def delta(self, name: str, base: ReadBase, rows: Span | None = None, device: torch.device | str = "cpu") -> Tensor:
        """What strength 1 adds to parameter `name`, or to some of its rows: fp32 on `device`.

        base: reads the parameter (or rows of it) without any LoRA, fp32 on that device; only called for DoRA and
        `set_weight`, which depend on it.
        """
        first, *others = (update.delta(base, rows, torch.device(device)) for update in self.updates[name])
        return sum(others, first)

    def check(self, name: str, strength: float, base: ReadBase, added: Tensor, dtype: torch.dtype) -> None:
        """Raises SwanError where what `strength` adds to parameter `name` is not finite, or more than `dtype` holds."""
        largest = float(added.abs().amax()) * abs(strength) if added.numel() else 0.0
        if largest <= torch.finfo(dtype).max:  # false for NaN as well
            return
        if broken := next(filter(None, (update.broken() for update in self.updates[name])), None):
            raise SwanError(f"{self.path}: tensor {printable(broken)} holds infinite or NaN numbers: a broken LoRA")
        if not base(None).isfinite().all():
            raise SwanError(f"{name} of the checkpoint holds infinite or NaN numbers: no LoRA can be added to it")
        key = printable(next(iter(self.updates[name][0].keys.values())))
        kind = str(dtype).removeprefix("torch.")
        raise SwanError(
            f"{self.path}: what {key} adds to {name} at strength {strength:g} is more than {kind} holds; take less"
        )


def open_lora(path: str | PathLike, shapes: Mapping[str, Shape], expert: str = "model") -> Lora:
    """Open a LoRA for a model of parameters `shapes` (see `weight_shapes`): headers only, nothing is computed.

    expert: "high" or "low", or "model" where there is one. Of a file with a half for each, its own is taken; a file
    with only that of the other one has no updates, and says so in `notes`. Raises SwanError, one line, for a file that
    is no LoRA, of which nothing fits, or whose shapes are another model's.
    """
    source = open_source(path)
    modules, unmatched, has_halves = sort_keys(source, shapes, expert)
    config = read_config(source, expert, has_halves)
    updates: dict[str, list[Update]] = {}
    wrong: list[str] = []
    for name, module in modules.items():
        if problem := _misses_reshape(source, name, module, shapes):
            wrong.append(problem)
        for parameter, update in _updates(source, name, module, shapes, config):
            if parameter not in shapes or _has_more_channels(update):
                unmatched += update.keys.values()
            elif problem := _problem(update):
                wrong.append(f"{parameter} {problem}")
            else:
                updates.setdefault(parameter, []).append(update)
    where, unused = source.describe(), f"{len(unmatched)} of {len(source.keys())} keys"
    if wrong:
        raise SwanError(f"{where}: a LoRA that does not fit this model: {_some(wrong)} ({len(wrong)} in all)")
    if has_halves and not modules:
        other = "low" if expert == "high" else "high"
        return Lora(str(path), {}, (f"warning: {where}: is for the {other}-noise expert only",))
    if not updates:
        raise SwanError(f"{where}: a LoRA of which nothing fits this model ({unused} are foreign: {_some(unmatched)})")
    notes = [f"warning: {where}: {unused} are not used: {families(unmatched, shapes)}"] if unmatched else []
    if config.not_obeyed:
        what = f"alpha_pattern {printable(config.not_obeyed[0])[:80]} is a regular expression, which is not obeyed"
        notes.append(f"warning: {where}: {what}: what it means gets lora_alpha")
    return Lora(str(path), {name: tuple(found) for name, found in updates.items()}, tuple(notes))


def weight_shapes(model: nn.Module) -> dict[str, Shape]:
    """Official name -> shape of every parameter of `model`; of a packed one that of the matrix it stands for."""
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            del shapes[f"{path}.blocks"]
            shapes[f"{path}.weight"] = tuple(layer.shape)
    return shapes


@torch.inference_mode(False)  # branches may take part in autograd
@torch.no_grad()
def set_loras(
    model: nn.Module, source: Source, loras: Iterable[tuple[Lora, float]], device: torch.device | None = None
) -> None:
    """Give a transformer that was loaded from `source` exactly these (LoRA, strength), whatever it had before.

    A dense parameter becomes round(base + sum of strength * delta), computed in fp32 from the checkpoint's own value;
    one that no LoRA changes any more is read again, so that it has the bits it was loaded with. Packed layers get side
    branches. Parameters whose LoRAs and strengths stay are left alone. Beside the model, one parameter and its delta
    are in memory, in fp32; where ranks share weights out, the own rows of it. device: where this is computed and where
    branches are put (None: where the parameter is). Parameters on the meta device are left to `with_loras`, which gives
    them their values when they are read.
    """
    wanted: dict[str, tuple[tuple[Lora, float], ...]] = {}
    for lora, strength in loras:
        for name in lora.updates if strength else ():
            wanted[name] = (*wanted.get(name, ()), (lora, strength))
    had = model.__dict__.setdefault("loras", {})  # parameter -> what it holds; true whenever this stops
    stored = our_names(source, "dit")
    names = [name for name in sorted(had.keys() | wanted.keys()) if had.get(name, ()) != wanted.get(name, ())]
    jobs = (_base_job(model, name, source, stored[name]) for name in names)
    for name, base in zip(names, in_turn(jobs, READERS), strict=True):
        now = wanted.get(name, ())
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        if leaf == "weight" and isinstance(layer, QuantLinear):
            branches = _branches(layer, name, model.dtype, source, stored[name], now, device or layer.blocks.device)
            layer.branches = nn.ModuleList(branch.to(model.dtype) for branch in branches)
        elif base is not None:
            _merge(getattr(layer, leaf), name, base, now, device)
        had[name] = now
        if not now:
            del had[name]


class Base:
    """A parameter as the checkpoint has it, or some of its rows, read once: fp32 on `device`, in memory of its own.

    held: of `rows`, as the file has it, where that was read before
    """

    def __init__(
        self,
        source: Source,
        stored: str | Rows,
        shape: Shape,
        rows: Span | None = None,
        held: Tensor | PackedTensor | None = None,
    ):
        self.rows, self.shape, self.device = rows, shape, torch.device("cpu")
        self._source, self._stored = source, stored
        self._held = {} if held is None else {rows: held}

    def read(self) -> Base:
        """Reads `rows` now. Returns itself."""
        self._read(self.rows)
        return self

    def __call__(self, rows: Span | None) -> Tensor:
        return self.as_type(rows, torch.float32, self.device)

    def as_type(self, rows: Span | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        weights = as_tensor(self._read(rows).to(device), dtype).to(dtype, copy=True)
        return weights.reshape(self.shape if rows is None else (rows[1] - rows[0], *self.shape[1:]))

    def _read(self, rows: Span | None) -> Tensor | PackedTensor:
        if rows not in self._held:
            self._held[rows] = read_stored(self._source, self._stored, self.shape, rows)
        return self._held[rows]


def with_loras(model: nn.Module, name: str, base: Base, device: torch.device) -> Tensor | None:
    """The value of a parameter on the meta device, or of the rows of `base`, with the LoRAs that the model was given
    last, computed on `device`; None where none of them changes it."""
    loras = model.__dict__.get("loras", {}).get(name)
    if not loras:
        return None
    dtype = model.get_parameter(name).dtype
    with torch.no_grad():
        return _merged(name, dtype, base, loras, device).to(dtype)


def _base_job(model: nn.Module, name: str, source: Source, stored: str | Rows) -> tuple[int, Callable[[], Base | None]]:
    """What `in_turn` is given of a parameter; the base is None where nothing is to be read or merged now."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if leaf == "weight" and isinstance(layer, QuantLinear):
        return 0, lambda: None
    parameter = getattr(layer, leaf)
    rows = own_rows(parameter) if hasattr(parameter, "device_mesh") else None
    if parameter.is_meta or (rows and rows[0] == rows[1]):
        return 0, lambda: None
    return parameter.nbytes, Base(source, stored, tuple(parameter.shape), rows).read


def _merge(
    parameter: nn.Parameter, name: str, base: Base, loras: Iterable[tuple[Lora, float]], device: torch.device | None
) -> None:
    """Write the parameter anew, or the rows of it that this rank keeps."""
    kept = parameter if base.rows is None else parameter.detach().to_local()
    if loras:
        value = _merged(name, parameter.dtype, base, loras, device or kept.device)
    else:
        value = base.as_type(base.rows, parameter.dtype, kept.device)
    with torch.inference_mode():  # which the parameter may have been made in
        kept.copy_(value)


def _merged(
    name: str, dtype: torch.dtype, base: Base, loras: Iterable[tuple[Lora, float]], device: torch.device
) -> Tensor:
    """The rows of `base` with the LoRAs added: fp32 on `device`, for `dtype`."""
    base.device = device
    value = base(base.rows)
    for lora, strength in loras:
        delta = lora.delta(name, base, base.rows, device)
        lora.check(name, strength, base, delta, dtype)
        if delta.any():  # adding 0 would make 0 of -0
            value.add_(delta, alpha=strength)
    return value


def _branches(
    layer: QuantLinear,
    name: str,
    dtype: torch.dtype,
    source: Source,
    stored: str | Rows,
    loras: Iterable[tuple[Lora, float]],
    device: torch.device,
) -> Iterator[Branch]:
    base = Base(source, stored, tuple(layer.shape))
    base.device = device
    for lora, strength in loras:
        branches = [update.branch(base, strength, device) for update in lora.updates[name]]
        if not sum(branch.bound() for branch in branches) <= torch.finfo(dtype).max:  # the sum itself may yet be less
            lora.check(name, strength, base, lora.delta(name, base, None, device), dtype)
        yield from branches


def _updates(
    source: Source, path: str, module: Module, shapes: Mapping[str, Shape], config: AdapterConfig
) -> Iterator[tuple[str, Update]]:
    """(parameter, what the tensors of one module do to it); not all of them need be parameters of the model."""
    path, _, half = path.partition(":")
    factors = {part: key for part, key in module.keys.items() if part not in (*_SINGLE, "reshape", "alpha")}
    found = [("weight", "product", factors, True)] if factors else []
    for part, (leaf, kind) in _SINGLE.items():
        if part in module.keys:
            found.append((leaf, kind, {"value": module.keys[part]}, part == "up_bias"))
    divisor = rank({part: source.info(key).shape for part, key in factors.items()})
    scaling = {}
    if divisor and "alpha" in module.keys:
        scaling = {"scale": 1 / divisor, "alpha": module.keys["alpha"]}
    elif divisor:
        scaling = {"scale": config.scale(module.stem, divisor)}
    for leaf, kind, keys, is_scaled in found:
        name = path if path in shapes else f"{path}.{leaf}"
        shape = shapes.get(name, ())
        more = dict(scaling) if is_scaled else {}
        if half and shape:
            shape, more["half"] = (shape[0] // 2, *shape[1:]), int(half)
        yield name, Update(kind, source, keys, shape, **more)


def _problem(update: Update) -> str:
    """Why the tensors do not fit the parameter; "" if they do."""
    infos = {part: update.source.info(key) for part, key in update.keys.items()}
    if empty := [part for part, info in infos.items() if 0 in info.shape]:
        return f"has no numbers in {empty[0]} {list(infos[empty[0]].shape)}"
    if odd := [info.dtype for info in infos.values() if not info.dtype.is_floating_point]:
        return f"is {str(odd[0]).removeprefix('torch.')}, not a float"
    if update.alpha:
        alpha = update.source.info(update.alpha)
        if math.prod(alpha.shape) != 1 or alpha.dtype.is_complex:
            return f"has an alpha of shape {list(alpha.shape)}, {str(alpha.dtype).removeprefix('torch.')}"
    if sum(any(part.startswith(one) for part in infos) for one in ("up", "lokr", "hada")) > 1:
        return f"has factors of two kinds: {', '.join(infos)}"
    try:
        held = update.held_shape()
    except KeyError as error:
        return f"is incomplete (no {error.args[0]})"
    except _BAD_SHAPES:
        factors = ", ".join(f"{part} {list(info.shape)}" for part, info in infos.items())
        return f"has factors that do not go together: {factors}"
    if not _fits(held, update.shape):
        widths = [_WIDTHS.get(shape[0]) if shape else None for shape in (held, update.shape)]
        is_told = all(widths) and widths[0] != widths[1]
        hint = f" (it was made for {widths[0]} model, this is {widths[1]} model)" if is_told else ""
        return f"{list(held)} for {list(update.shape)}{hint}"
    if "dora" in infos and not fits_dora(infos["dora"].shape, update.shape):
        return f"has a magnitude of {list(infos['dora'].shape)} for {list(update.shape)}"
    return ""


def _misses_reshape(source: Source, path: str, module: Module, shapes: Mapping[str, Shape]) -> str:
    """What is wrong where the weight should first be padded to another shape, which this model's layers cannot be."""
    if "reshape" not in module.keys or f"{path}.weight" not in shapes:
        return ""
    if math.prod(source.info(module.keys["reshape"]).shape) > _MAX_AXES:
        return f"{path}.weight is to be reshaped to what is no shape"
    asked = source.read(module.keys["reshape"]).flatten().tolist()
    has = list(shapes[f"{path}.weight"])
    return "" if asked == has else f"{path}.weight is to be reshaped to {asked}, from {has}"


def _fits(held: Shape, shape: Shape) -> bool:
    """Equal up to axes of size 1; a convolution's may be folded, and may lack the last of its input channels."""
    if [size for size in held if size != 1] == [size for size in shape if size != 1]:
        return True
    if len(shape) != 5 or not held or held[0] != shape[0]:
        return False
    return math.prod(held) == math.prod(shape) or (_but_channels(held) == _but_channels(shape) and held[1] < shape[1])


def _fitted(tensor: Tensor, shape: Shape) -> Tensor:
    """In the shape that it fits. The channels a convolution lacks, which are those of conditions, get zeros."""
    if tensor.numel() == math.prod(shape):
        return tensor.reshape(shape)
    return F.pad(tensor, (*[0, 0] * (len(shape) - 2), 0, shape[1] - tensor.shape[1]))


def _has_more_channels(update: Update) -> bool:
    """Whether it belongs to a patch embedding with further input channels: conditions that this model does not take."""
    if len(update.shape) != 5 or _problem(update) == "":
        return False
    try:
        held = update.held_shape()
    except (KeyError, *_BAD_SHAPES):
        return False
    return _but_channels(held) == _but_channels(update.shape) and held[1] > update.shape[1]


def _but_channels(shape: Shape) -> Shape:
    return (*shape[:1], *shape[2:])


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _cut(tensor: Tensor, rows: Span | None) -> Tensor:
    return tensor if rows is None else tensor[slice(*rows)]


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
