"""What a pickle of tensors says, read as data: nothing is imported, called or allocated by it. No torch.

A pickle is a program for a stack machine. Here, the functions it would call are kept as names, and the calls by which
`torch.save` writes a tensor become a `View` of a `Storage`. What torch's own reader refuses with `weights_only=True` is
refused as well.

The machine's instructions: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

_MAX_PIECE_BYTES = 1 << 20  # of one text or number in the pickle
_OBJECT_BYTES = 64  # what most instructions cost in memory
_SLACK_BYTES = 16 << 20
_MAX_DIMS = 16


class Forbidden(Exception):
    """The pickle asks for what could run code: its message is the name."""


class Name(NamedTuple):
    """Something that the pickle would import."""

    path: str


class Storage(NamedTuple):
    """A piece of memory that lies in the file. kind: "Float" of `torch.FloatStorage`; count: of elements."""

    kind: str
    key: str
    count: int


class View(NamedTuple):
    """A tensor: elements of a storage. dtype: the name torch has for it, or None if the storage tells it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str | None = None


class Other(NamedTuple):
    """Any other object. tensor: what kind of tensor it is, if it is one."""

    tensor: str | None = None


_OTHER = Other()
_UTILS = "torch._utils."
_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter")
_OTHER_TENSORS = {
    "torch.Tensor": "written by an old version of torch",
    f"{_UTILS}_rebuild_sparse_tensor": "sparse",
    f"{_UTILS}_rebuild_qtensor": "quantised by torch",
    f"{_UTILS}_rebuild_nested_tensor": "nested",
    f"{_UTILS}_rebuild_meta_tensor_no_storage": "without values (of the meta device)",
    f"{_UTILS}_rebuild_wrapper_subclass": "of a class of its own",
    f"{_UTILS}_rebuild_device_tensor_from_numpy": "of a special device",
    f"{_UTILS}_rebuild_device_tensor_from_cpu_tensor": "of a special device",
}
_HARMLESS = ("collections.Counter", "torch.device", "torch.serialization._get_layout", "_codecs.encode")
_HARMLESS += tuple(f"builtins.{name}" for name in ("bytearray", "set", "complex"))
_HARMLESS += ("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.dtype", "numpy.ndarray")
_NUMPY = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
_HARMLESS += tuple(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY)
_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64 complex32"
_DTYPES += " uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
_DTYPES += " quint8 qint8 qint32 quint4x2 quint2x4 float4_e2m1fn_x2 strided sparse_coo sparse_csr"
_DTYPES += " per_tensor_affine per_tensor_symmetric per_channel_affine per_channel_affine_float_qparams"
_VALUES = frozenset(f"torch.{name}" for name in _DTYPES.split())


class Reader:
    """The bytes of a file from where it is to `end`, in pieces of bounded size; and how much memory what they say may
    take: `room_bytes` and a little more."""

    def __init__(self, file: BinaryIO, end: int, room_bytes: int):
        self._file, self._left = file, end - file.tell()
        self._room_bytes = room_bytes + _SLACK_BYTES

    def read(self, count: int) -> bytes:
        if count > _MAX_PIECE_BYTES:
            raise ValueError(f"a piece of {count:,} bytes")
        return self._counted(self._file.read(min(count, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(min(_MAX_PIECE_BYTES, self._left)))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data

    def charge(self, value: object) -> None:
        self._room_bytes -= _OBJECT_BYTES if value is None else _OBJECT_BYTES + sys.getsizeof(value)
        if self._room_bytes < 0:
            raise ValueError("it would take much more memory than the file has bytes")


def read_pickle(reader: Reader, storages: dict[str, Storage] | None = None) -> Any:
    """The next pickle: dicts, lists, tuples, texts and numbers as they are, else `View`, `Other` and `Name`.

    Dicts keep the entries whose keys are texts or numbers. storages: those that it names are put there, by their keys.
    Raises Forbidden, or any other exception if it is damaged.
    """
    machine = _Machine({} if storages is None else storages)
    for opcode, argument, _ in pickletools.genops(reader):
        reader.charge(argument)
        if opcode.name == "STOP":
            return machine.stack.pop()
        instruction = _INSTRUCTIONS.get(opcode.name)
        if instruction is None:
            raise ValueError(f"it has the instruction {opcode.name}")
        instruction(machine, argument)
    raise ValueError("it has no end")


class _Machine:
    """The stack; what lies below each mark; and the objects that can be asked for again, by number."""

    def __init__(self, storages: dict[str, Storage]):
        self.storages = storages
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def take(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("its stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def update(self, pairs: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_entries(pairs))

    def build(self, _: Any) -> None:
        target, _ = self.take(2)
        if isinstance(target, View):
            raise ValueError("it changes a tensor after making it")
        self.push(target)

    def call(self, _: Any) -> None:
        self.push(_call(*self.take(2)))

    def import_name(self, path: str) -> None:
        self.push(_name(path))

    def storage(self, _: Any) -> None:
        """("storage", class, key, device, count), and before torch 1.6 a view of it, which is None."""
        kind, what, key, _, count, *view = self.stack.pop()
        is_storage = kind == "storage" and isinstance(what, Name) and what.path.endswith("Storage")
        if not is_storage or not isinstance(key, str) or not _is_size(count) or any(one is not None for one in view):
            raise ValueError("a storage that is none")
        storage = Storage(what.path.rpartition(".")[2].removesuffix("Storage"), key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"the storage {key[:200]} is said to be of two types or sizes")
        self.push(storage)


def _name(path: str) -> Name:
    module, _, name = path.rpartition(".")
    module = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}.get(module, module)
    path = f"{module}.{name}"
    is_storage = module.split(".")[0] == "torch" and name.endswith("Storage")
    known = path in _CALLS or path in _OTHER_TENSORS or path in _HARMLESS or path in _VALUES or path in _PLAIN_TENSORS
    if not known and not is_storage:
        raise Forbidden(path)
    return Name(path)


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise ValueError("a call of what is no function")
    if function.path in _CALLS:
        return _CALLS[function.path](*arguments)
    return Other(_OTHER_TENSORS.get(function.path))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> View:
    shape, stride = _sizes(shape), _sizes(stride)
    if not isinstance(storage, Storage) or not all(map(_is_size, (offset, *shape, *stride))):
        raise ValueError("a tensor that is none")
    if len(shape) != len(stride):
        raise ValueError("a tensor with more sizes than strides")
    return View(storage, offset, shape, stride)


def _tensor_v2(storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, bits: Any = None) -> Any:
    tensor = _tensor(storage, offset, shape, stride)
    return Other("conjugated or negated") if bits else tensor


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, bits: Any = None
) -> Any:
    tensor = _tensor_v2(storage, offset, shape, stride, None, None, bits)
    if not isinstance(dtype, Name):
        raise ValueError("a type that is none")
    return tensor._replace(dtype=dtype.path.removeprefix("torch.")) if isinstance(tensor, View) else tensor


def _same(tensor: Any, *_: Any) -> Any:
    """A tensor with something around it."""
    return tensor if isinstance(tensor, (View, Other)) else _OTHER


def _of_class(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, or of a class of its own."""
    tensor = _call(function, arguments)
    is_plain = isinstance(kind, Name) and kind.path in _PLAIN_TENSORS
    return tensor if is_plain else Other("of a class of its own")


def _entries(flat: list[Any]) -> dict[str | int, Any]:
    """A dict from keys and values in turn."""
    if len(flat) % 2:
        raise ValueError("a dict with a key and no value")
    # Other keys are of no use here, and the hash of a deeply nested tuple ends the process.
    return {key: value for key, value in zip(flat[::2], flat[1::2]) if isinstance(key, str) or _is_size(key)}


def _sizes(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > _MAX_DIMS:
        raise ValueError("sizes that are none")
    return tuple(sizes)


def _is_size(number: Any) -> bool:
    """Below 2**60 a number is its own hash, so that no dict becomes slow by numbers chosen for it."""
    return type(number) is int and 0 <= number < 1 << 60


_CALLS: dict[str, Callable[..., Any]] = {
    f"{_UTILS}_rebuild_tensor": _tensor,
    f"{_UTILS}_rebuild_tensor_v2": _tensor_v2,
    f"{_UTILS}_rebuild_tensor_v3": _tensor_v3,
    f"{_UTILS}_rebuild_parameter": _same,
    f"{_UTILS}_rebuild_parameter_with_state": _same,
    "torch.nn.parameter.Parameter": _same,
    "torch._tensor._rebuild_from_type_v2": _of_class,
    "torch.Size": _sizes,
    "collections.OrderedDict": lambda: {},  # its entries follow
}
_LITERALS = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE"
_LITERALS += " BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_LITERALS.split(), _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.take(1),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.take(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "APPEND": lambda machine, _: machine.extend(machine.take(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": lambda machine, _: machine.push(_entries(machine.since_mark())),
    "SETITEM": lambda machine, _: machine.update(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "EMPTY_SET": lambda machine, _: machine.push(_OTHER),
    "FROZENSET": lambda machine, _: (machine.since_mark(), machine.push(_OTHER)),
    "ADDITEMS": lambda machine, _: machine.since_mark(),
    "GLOBAL": lambda machine, path: machine.import_name(path.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.import_name(".".join(machine.take(2))),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
