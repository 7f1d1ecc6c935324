"""The header of a GGUF file: keys and values, then the table of tensors.

Read in order through a window of plain reads. Every length is checked against the file before it is used, and the
elements of arrays are passed over: the tokenizer of an encoder file has 256,384 strings that nobody may ask for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wan.errors import SwanError
from wan.quant.ggml import BY_ID, GGMLType
from wan.weights.source import truncated

_WINDOW_BYTES = 1 << 20
_MAX_HEADER_BYTES = 256 << 20  # the largest tokenizers take some 20 MB
_MAX_ENTRIES = 1 << 17  # of tensors, and of keys; the largest Wan file has 1,331 tensors
_MAX_NAME_BYTES = 65_535  # of a key, by the format
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMS = 5  # ggml has 4; the patch embedding of Wan is written with 5
_MAX_COUNT = 2**63 - 1  # what a size or an offset may be
_DEFAULT_ALIGNMENT = 32

_U32, _U64, _COUNTS = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<QQ")
_MIN_KEY_BYTES, _MIN_TENSOR_BYTES = 13, 32  # an entry with an empty name

STRING, ARRAY, BOOL = 8, 9, 7
# Value type -> layout of the types of fixed size, in the notation of `struct`.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_LAYOUTS = {one: struct.Struct("<" + code) for one, code in SCALARS.items()}


@dataclass(frozen=True)
class GGUFArray:
    """An array among the values: where its elements lie. `type` is the format's number of the element type."""

    type: int
    count: int
    offset: int
    size_bytes: int


Value = int | float | bool | str | GGUFArray


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the table. ne: sizes as stored, the row first; offset: of its data in the file."""

    name: str
    ne: tuple[int, ...]
    type: GGMLType
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Value]
    tensors: list[TensorEntry]


def read_header(path: Path, file: BinaryIO, size_bytes: int) -> Header:
    """The checked header of `file`, which has `size_bytes` bytes. SwanError if the file is not whole and sane."""
    window = _Window(path, file, size_bytes)
    tensor_count, key_count = _read_start(window)
    metadata: dict[str, Value] = {}
    alignment = _DEFAULT_ALIGNMENT
    for index in range(key_count):
        key = window.name(f"the name of key {index}")
        if key in metadata:
            raise window.error(f"the key {key} is there twice")
        type_id = window.number(_U32)
        metadata[key] = _read_value(window, key, type_id)
        if key == "general.alignment":
            alignment = _check_alignment(window, metadata[key], type_id)
    entries, names = [], set()
    for index in range(tensor_count):
        entry = _read_entry(window, index)
        if entry.name in names:
            raise window.error(f"the tensor {entry.name} is there twice")
        names.add(entry.name)
        entries.append(entry)
    data_start = -(-window.offset // alignment) * alignment
    return Header(metadata, _place(window, entries, data_start, alignment))


def read_elements(path: Path, file: BinaryIO, key: str, array: GGUFArray) -> list:
    """The elements of an array."""
    file.seek(array.offset)
    data = file.read(array.size_bytes)
    if len(data) < array.size_bytes:
        raise SwanError(f"{path}: the file ended inside {key}; it changed while being read")
    if array.type == STRING:
        try:
            return list(_strings(data, array.count))
        except UnicodeDecodeError:
            raise SwanError(f"{path}: {key} holds a string that is not UTF-8: the file is damaged") from None
    if array.type == BOOL and data.translate(None, b"\0\1"):
        raise SwanError(f"{path}: {key} holds a bool that is neither 0 nor 1: the file is damaged")
    elements = list(struct.unpack(f"<{array.count}{SCALARS[array.type]}", data))
    return [element == 1 for element in elements] if array.type == BOOL else elements


class _Window:
    """Fields of the header, in their order."""

    def __init__(self, path: Path, file: BinaryIO, size_bytes: int):
        self.path, self.size_bytes = path, size_bytes
        self._file = file
        self._start, self._at, self._buffer = 0, 0, b""  # where the buffer lies in the file; where the next field is

    @property
    def offset(self) -> int:
        """Of the next field in the file."""
        return self._start + self._at

    def error(self, problem: str) -> SwanError:
        return SwanError(f"{self.path}: {problem}")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if self.offset + count > self.size_bytes:
            raise truncated(self.path, self.offset + count, self.size_bytes, "at least ")
        self._fill(count)
        self._at += count
        return self._buffer[self._at - count : self._at]

    def number(self, layout: struct.Struct) -> int | float:
        return layout.unpack(self.take(layout.size))[0]

    def name(self, what: str) -> str:
        """A key, or the name of a tensor."""
        name = self.string(what, _MAX_NAME_BYTES)
        if not name.isprintable():  # it will stand in messages of one line
            raise self.error(f"{what} holds control characters ({name[:40]!r}): the header is damaged")
        return name

    def string(self, what: str, limit: int = _MAX_HEADER_BYTES) -> str:
        length = self.number(_U64)
        self.check_room(length, what)
        if length > limit:
            raise self.error(f"{what} has {length:,} bytes, at most {limit:,} are allowed: the header is damaged")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8: the header is damaged") from None

    def skip(self, count: int) -> None:
        """Pass over bytes that `check_room` found to be there."""
        self._at += count

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over strings by their lengths."""
        length_at = _U64.unpack_from
        while count:
            if self.offset + 8 > self.size_bytes:
                raise truncated(self.path, self.offset + 8 * count, self.size_bytes, "at least ")
            self._fill(8)
            buffer, at, last = self._buffer, self._at, len(self._buffer) - 8
            while count and at <= last:
                at += 8 + length_at(buffer, at)[0]
                count -= 1
            self._at = at  # often behind the buffer, and behind the file if a length is wrong
            self.check_room(0, what)

    def check_room(self, count: int, what: str) -> None:
        """The file, and the part of it that can be header, must have `count` more bytes."""
        end = self.offset + count
        if end > self.size_bytes:
            problem = f"{what} ends at byte {end:,}, past the end of the file ({self.size_bytes:,} bytes)"
            raise self.error(f"{problem}: truncated or damaged; download it again")
        if end > _MAX_HEADER_BYTES:
            raise self.error(f"{what} ends at byte {end:,}, a header has at most {_MAX_HEADER_BYTES:,}")

    def _fill(self, count: int) -> None:
        """Have `count` bytes in the buffer. The caller has checked that the file has them."""
        if self._at + count <= len(self._buffer):
            return
        self._start, self._at = self.offset, 0
        self._file.seek(self._start)
        self._buffer = self._file.read(min(max(count, _WINDOW_BYTES), self.size_bytes - self._start))
        if len(self._buffer) < count:
            raise self.error("the file ended inside its header; it changed while being read")


def _read_start(window: _Window) -> tuple[int, int]:
    """Check magic and version; the numbers of tensors and of keys."""
    if window.take(4) != b"GGUF":
        raise window.error("not a GGUF file")
    version = window.number(_U32)
    if version not in (2, 3):
        if version and version & 0xFFFF == 0:
            raise window.error("a big-endian GGUF file; convert it with gguf-convert-endian")
        old = "; convert the model again" if version == 1 else ""
        raise window.error(f"GGUF version {version}, only 2 and 3 can be read{old}")
    tensor_count, key_count = _COUNTS.unpack(window.take(_COUNTS.size))
    counts = f"the header tells of {tensor_count:,} tensors and {key_count:,} keys"
    if tensor_count * _MIN_TENSOR_BYTES + key_count * _MIN_KEY_BYTES > window.size_bytes - window.offset:
        raise window.error(f"{counts}, which do not fit in {window.size_bytes:,} bytes: truncated or damaged")
    if max(tensor_count, key_count) > _MAX_ENTRIES:
        raise window.error(f"{counts}, at most {_MAX_ENTRIES:,} are allowed: the header is damaged")
    if not tensor_count:
        raise window.error("holds no tensors")
    return tensor_count, key_count


def _read_value(window: _Window, key: str, type_id: int) -> Value:
    if type_id == STRING:
        return window.string(f"the value of {key}")
    if type_id == ARRAY:
        return _read_array(window, key)
    layout = _LAYOUTS.get(type_id)
    if layout is None:
        raise window.error(f"the key {key} has the unknown value type {type_id}")
    value = window.number(layout)
    if type_id != BOOL:
        return value
    if value not in (0, 1):
        raise window.error(f"the key {key} is a bool of value {value}: the header is damaged")
    return value == 1


def _read_array(window: _Window, key: str) -> GGUFArray:
    type_id, count = window.number(_U32), window.number(_U64)
    if type_id == ARRAY:
        raise window.error(f"the key {key} is an array of arrays, which cannot be read")
    if type_id != STRING and type_id not in _LAYOUTS:
        raise window.error(f"the key {key} is an array of the unknown value type {type_id}")
    start, what = window.offset, f"the array {key} of {count:,} elements"
    least_bytes = count * (8 if type_id == STRING else _LAYOUTS[type_id].size)
    window.check_room(least_bytes, what)
    if type_id == STRING:
        window.skip_strings(count, what)
    else:
        window.skip(least_bytes)
    return GGUFArray(type_id, count, start, window.offset - start)


def _check_alignment(window: _Window, value: Value, type_id: int) -> int:
    sane = type_id == 4 and 0 < value <= _MAX_ALIGNMENT and value & (value - 1) == 0
    if not sane:
        told = value if isinstance(value, int) else type(value).__name__
        raise window.error(f"general.alignment is {told} (type {type_id}), expected a power of two (uint32)")
    return value


def _read_entry(window: _Window, index: int) -> TensorEntry:
    """One line of the table. Its offset still counts from where the data begins."""
    name = window.name(f"the name of tensor {index}")
    if not name:
        raise window.error(f"tensor {index} has no name: the header is damaged")
    dims = window.number(_U32)
    if not 0 < dims <= _MAX_DIMS:
        raise window.error(f"tensor {name} has {dims} dimensions, expected 1 to {_MAX_DIMS}")
    layout = struct.Struct(f"<{dims}QIQ")
    *ne, type_id, offset = layout.unpack(window.take(layout.size))
    if not all(0 < size <= _MAX_COUNT for size in ne) or math.prod(ne) > _MAX_COUNT:
        raise window.error(f"tensor {name} has the impossible shape {ne[::-1]}: the header is damaged")
    ggml_type = BY_ID.get(type_id)
    if ggml_type is None:
        raise window.error(f"tensor {name} has the ggml type {type_id}, which cannot be read")
    try:
        size_bytes = ggml_type.tensor_bytes(ne[::-1])
    except ValueError as error:
        raise window.error(f"tensor {name} of shape {ne[::-1]}: {error}") from None
    if max(size_bytes, offset + size_bytes) > _MAX_COUNT:
        raise window.error(f"tensor {name} has {size_bytes:,} bytes at offset {offset:,}: the header is damaged")
    return TensorEntry(name, tuple(ne), ggml_type, offset, size_bytes)


def _place(window: _Window, entries: list[TensorEntry], data_start: int, alignment: int) -> list[TensorEntry]:
    """The entries with offsets that count from the start of the file, aligned, in the file and apart."""
    for entry in entries:
        if entry.offset % alignment:
            offset = f"offset {entry.offset:,}, no multiple of the alignment {alignment}"
            raise window.error(f"tensor {entry.name} lies at {offset}: the header is damaged")
    previous = None
    for entry in sorted(entries, key=lambda one: one.offset):
        if previous and entry.offset < previous.offset + previous.size_bytes:
            raise window.error(f"the tensors {previous.name} and {entry.name} overlap: the header is damaged")
        previous = entry
    expected = data_start + previous.offset + previous.size_bytes
    if expected > window.size_bytes:
        raise truncated(window.path, expected, window.size_bytes)
    return [TensorEntry(one.name, one.ne, one.type, data_start + one.offset, one.size_bytes) for one in entries]


def _strings(data: bytes, count: int) -> Iterator[str]:
    """The strings that were passed over before; their lengths are known to fit."""
    at = 0
    for _ in range(count):
        (length,) = _U64.unpack_from(data, at)
        at += 8 + length
        yield data[at - length : at].decode()
