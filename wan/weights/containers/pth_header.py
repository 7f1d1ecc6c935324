"""The tensors of a PyTorch checkpoint (`.pth`, `.pt`, `.bin`): names, types, and where they lie. No torch.

torch.save writes a zip archive with a pickle, `NAME/data.pkl`, and the bytes of each storage, `NAME/data/KEY`. Before
torch 1.6 it was a row of pickles and then the storages one after the other, each after the number of its elements.
The pickle is read as data only, and every size in it is checked against the file before memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from wan.errors import SwanError, one_line
from wan.weights.containers.opened import OpenedFile
from wan.weights.containers.pickled import Forbidden, Other, Reader, Storage, View, read_pickle
from wan.weights.containers.zip_directory import Record, data_start, read_directory

ITEMSIZE = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
_OF_STORAGE = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
    **{"ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": "uint8", "_Untyped": "uint8"},
}
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
_SPARSE = 16  # a view is read with all that lies between its elements, which may be so many times as much
_MAX_ELEMENTS = 1 << 60
_MOST_NAMES = 3  # of one tensor, as of a T5's table of tokens: what is read may be so many times the file
_MAX_WRAPPERS = 3  # dicts around a state dict


@dataclass(frozen=True)
class TensorView:
    """A tensor of the file. dtype: as torch calls it; stride: in elements; place: where its storage is, a record of the
    archive or a byte of the file; offset: of its first element in there, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    place: Record | int
    offset: int

    @property
    def is_contiguous(self) -> bool:
        steps = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return all(size <= 1 or stride == step for size, stride, step in zip(self.shape, self.stride, steps))


def spanned(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie from the first to the last of a view, with all between them."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride)) if all(shape) else 0


def read_header(opened: OpenedFile) -> dict[str, TensorView]:
    """The tensors of the state dict, or of the one state dict inside a training checkpoint.

    Raises SwanError, one line, if the file would run code, or is not whole and sane, or holds no such thing.
    """
    path = opened.path
    if path.suffix == ".safetensors":
        raise SwanError(f"{path}: a PyTorch checkpoint under a safetensors name; rename it to {path.stem}.pth")
    try:
        with opened.open() as file:
            is_zip = file.read(4) == b"PK\3\4"
            content, places = (_read_zip if is_zip else _read_row)(path, file, opened.size_bytes)
        tensors = _tensors_of(path, content)
        views = {name: _checked(path, name, tensor, places) for name, tensor in tensors.items()}
    except Forbidden as error:
        what = f"it asks for {str(error)[:200]}, which could run code"
        raise SwanError(f"{path}: refused, {what}; convert it to safetensors") from None
    except SwanError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise SwanError(f"{path}: damaged or truncated ({opened.size_bytes:,} bytes): {one_line(error)}") from None
    taken = sum(_read_bytes(view) for view in views.values())
    if taken > _MOST_NAMES * opened.size_bytes:
        much = f"its tensors would take {taken:,} bytes, and it has {opened.size_bytes:,}"
        raise SwanError(f"{path}: {much}: they are views of the same memory; save copies of them (.clone())")
    return views


Places = Callable[[Storage], tuple[Record | int, int]]  # of a storage: where it is, and of how many bytes


def _read_zip(path: Path, file: BinaryIO, size_bytes: int) -> tuple[Any, Places]:
    records = read_directory(path, file, size_bytes)
    pickles = [name for name in records if name.endswith(b"/data.pkl") and name.count(b"/") == 1]
    if len(pickles) != 1:
        raise SwanError(f"{path}: a zip archive, but not a PyTorch checkpoint")
    folder = pickles[0].removesuffix(b"data.pkl")
    order = records.get(folder + b"byteorder")
    if order is not None:
        file.seek(data_start(path, file, order))
        if file.read(min(order.size_bytes, 6)) != b"little":
            raise SwanError(f"{path}: its numbers are in another byte order than this machine's; save it on this one")
    start = data_start(path, file, records[pickles[0]])
    file.seek(start)
    content = read_pickle(Reader(file, start + records[pickles[0]].size_bytes, size_bytes))

    def places(storage: Storage) -> tuple[Record, int]:
        record = records.get(folder + b"data/" + storage.key.encode())
        if record is None:
            raise ValueError(f"it has no storage {storage.key[:200]}")
        return record, record.size_bytes

    return content, places


def _read_row(path: Path, file: BinaryIO, size_bytes: int) -> tuple[Any, Places]:
    file.seek(0)
    reader, storages = Reader(file, size_bytes, size_bytes), {}
    if read_pickle(reader) != _MAGIC or read_pickle(reader) != _VERSION:
        raise ValueError("a pickle, but not of torch.save")
    read_pickle(reader)  # of the machine that wrote it
    content = read_pickle(reader, storages)
    found: dict[str, tuple[int, int]] = {}
    for key in read_pickle(reader):
        storage = storages[key]
        if int.from_bytes(file.read(8), "little") != storage.count or key in found:
            raise ValueError(f"the storage {key[:200]} is not where it should be")
        found[key] = file.tell(), storage.count * ITEMSIZE[_dtype(storage)]
        if sum(found[key]) > size_bytes:
            raise ValueError(f"the storage {key[:200]} ends at byte {sum(found[key]):,}")
        file.seek(sum(found[key]))
    return content, lambda storage: found[storage.key]


def _dtype(storage: Storage) -> str:
    if storage.kind not in _OF_STORAGE:
        raise ValueError(f"it has a {storage.kind[:200]}Storage")
    return _OF_STORAGE[storage.kind]


def _checked(path: Path, name: str, tensor: View | Other, places: Places) -> TensorView:
    """A tensor whose elements are all in its storage, and that in the file."""
    if isinstance(tensor, Other):
        raise SwanError(f"{path}: tensor {name} is {tensor.tensor}, which is not read; save it as a dense tensor")
    dtype = tensor.dtype or _dtype(tensor.storage)
    if dtype not in ITEMSIZE:
        raise SwanError(f"{path}: tensor {name} has the element type {dtype}, which is not read")
    itemsize = ITEMSIZE[dtype]
    storage_bytes = tensor.storage.count * ITEMSIZE[_dtype(tensor.storage)]
    place, there = places(tensor.storage)
    if there < storage_bytes:
        raise SwanError(f"{path}: the storage of tensor {name} has {there:,} bytes, and needs {storage_bytes:,}")
    span, offset = spanned(tensor.shape, tensor.stride) * itemsize, tensor.offset * itemsize
    if span and offset + span > storage_bytes or math.prod(size or 1 for size in tensor.shape) >= _MAX_ELEMENTS:
        raise SwanError(f"{path}: tensor {name} of shape {list(tensor.shape)} does not lie within its storage")
    return TensorView(dtype, tensor.shape, tensor.stride, place, offset)


def _read_bytes(view: TensorView) -> int:
    """What reading a tensor takes; of one whose elements lie apart, a part of what it passes over."""
    return max(math.prod(view.shape), spanned(view.shape, view.stride) // _SPARSE) * ITEMSIZE[view.dtype]


def _tensors_of(path: Path, content: Any, depth: int = 0) -> dict[str, View | Other]:
    """The tensors of a state dict, or of the one in a training checkpoint, which has a few tensors beside it."""
    direct, inner = _only_tensors(content), {}
    if isinstance(content, dict):
        inner = {key: tensors for key, value in content.items() if (tensors := _only_tensors(value))}
    for key in ("state_dict", "model"):
        if len(inner.get(key, ())) > len(direct):
            return inner[key]
    if direct:
        return direct
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict) and depth < _MAX_WRAPPERS:
            return _tensors_of(path, content[key], depth + 1)
    if len(inner) == 1:
        return next(iter(inner.values()))
    if inner:
        raise SwanError(f"{path}: holds several state dicts ({', '.join(map(str, inner))}); save the one to use")
    raise SwanError(f"{path}: holds no named tensors (a {type(content).__name__})")


def _only_tensors(content: Any) -> dict[str, View | Other]:
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(key, str) and _is_tensor(value)}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, View) or isinstance(value, Other) and value.tensor is not None
