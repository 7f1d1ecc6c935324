"""What a network computes and holds, counted while it runs on the meta device, where that takes no memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention
FLASH_CPU = aten._scaled_dot_product_flash_attention_for_cpu
WORK = flop_registry | {aten._addmm_activation: flop_registry[aten.addmm]}  # operations whose work is counted in FLOPs
# Allocations, and views that their schema does not call so: no pass over memory.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "alias"}


class Tally(TorchDispatchMode):
    """Counts while it is open. Only tensors on the meta device count; those that were there before do not.

    flops: by (place, "matmul" or "attention"), where a convolution is a matmul; 2 for each multiply-add.
    launches: operations that take a kernel, by place, those with FLOPs among them.
    passes: bytes that all others read and write, by place.
    uploads: how many of these read what lies on the host.
    live, peak: bytes of tensors that were made within and are not freed yet, now and at most.
    place: where it computes, "rest" but within `places`.
    """

    def __init__(self):
        super().__init__()
        self.flops: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.passes: Counter[str] = Counter()
        self.live = self.peak = self.uploads = 0
        self._places = ["rest"]
        self._storages: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the compiler would be imported, half a second's work, though there is nothing to compile

    @property
    def place(self) -> str:
        return self._places[-1]

    @contextmanager
    def places(self, named: Mapping[nn.Module, str]) -> Iterator[None]:
        """While this is open, what is computed within a module has the place of that name."""

        def enter(place: str) -> Callable[..., None]:
            return lambda *_: self._places.append(place)

        def leave(*_: Any) -> None:
            self._places.pop()

        hooks = [module.register_forward_pre_hook(enter(name)) for module, name in named.items()]
        hooks += [module.register_forward_hook(leave) for module in named]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.scaled_dot_product_attention.default and args[0].is_meta:
            with self:  # by one kernel, which does not write the scores to memory
                return FLASH_CPU(*args[:3], **kwargs)[0]
        if func.overloadpacket not in WORK and _is_composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = _result(func, args, kwargs)
        self.count(func, args, kwargs, out)
        return out

    def count(self, func, args, kwargs: dict[str, Any], out: Any) -> None:
        """One operation that is not made of others."""
        tensors = _tensors([out])
        if not all(tensor.is_meta for tensor in tensors):
            return
        packet = FLASH if func.overloadpacket is FLASH_CPU else func.overloadpacket
        if packet in WORK:
            kind = "attention" if packet is FLASH else "matmul"
            self.flops[self.place, kind] += WORK[packet](*args, **kwargs, out_val=out)
        if func.is_view:
            return
        inputs = _tensors([*args, *kwargs.values()])
        if packet.__name__ not in FREE:
            self.launches[self.place] += 1
            self.uploads += not all(tensor.is_meta for tensor in inputs)
            if packet not in WORK:
                read = inputs[1:] if packet is aten.copy_ else inputs  # does not read what it overwrites
                self.passes[self.place] += sum(tensor.nbytes for tensor in (*read, *tensors))
        given = {one.untyped_storage()._cdata for one in inputs}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._storages:
                self._hold(storage)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def let_go(_: weakref.ref) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, let_go)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among the values, and in lists of them."""
    found = []
    for one in values:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += _tensors(one)
    return found


def _result(func, args, kwargs: dict[str, Any]) -> Any:
    """What `func` gives. On the meta device most of its time goes into telling the shape, so that is told once."""
    if _is_in_place(func) and args[0].is_meta:
        return args[0]
    if func.is_view or func._schema.is_mutable or len(func._schema.returns) != 1:
        return func(*args, **kwargs)
    asked = (func, _form(args), _form(tuple(kwargs.items())))
    if asked not in _forms:
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_meta:
            return out
        if func in (aten.convolution.default, aten._convolution.default):
            out = _as_convolved(args[0], out)
        if len(_forms) == _MOST_FORMS:
            _forms.clear()
        _forms[asked] = out.shape, out.stride(), out.dtype
        return out
    shape, stride, dtype = _forms[asked]
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


_forms: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
_MOST_FORMS = 20_000


def _form(value: Any) -> Any:
    """What the result's shape depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_form, value)) if isinstance(value, (list, tuple)) else value


@cache
def _is_in_place(func) -> bool:
    return func is aten.copy_.default or (torch.Tag.pointwise in func.tags and func.overloadpacket.__name__[-1] == "_")


@cache
def _is_composite(func) -> bool:
    """Whether it is made of others, as those that inference mode hands on whole."""
    key = "CompositeImplicitAutograd"
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _as_convolved(x: Tensor, out: Tensor) -> Tensor:
    """The result of a convolution in the order in which a device writes it; that of the meta device is another."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if form is None or not x.is_contiguous(memory_format=form) or out.is_contiguous(memory_format=form):
        return out
    return out.contiguous(memory_format=form)
