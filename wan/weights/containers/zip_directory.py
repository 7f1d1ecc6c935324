"""Where the records of a zip archive lie that `torch.save` wrote: stored, not compressed. No torch.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from wan.errors import SwanError
from wan.weights.source import truncated

_END = struct.Struct(
    "<4s4H2LH"
)  # signature, disk, first disk, entries here, entries, bytes and offset of the directory
_LOCATOR = struct.Struct("<4sLQL")  # signature, disk, offset of the long end, disks
_LONG_END = struct.Struct("<4sQ2H2L4Q")  # signature, size, versions, disks, entries here, entries, bytes, offset
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")
_MAX_COMMENT_BYTES = 65_535
_MAX_RECORDS = 1 << 15  # the largest checkpoints of Wan in training have some 5,000
_IN_EXTRA = 0xFFFF_FFFF  # a size or offset that is in the extra field
_LONG_FIELD = 1


class Record(NamedTuple):
    """One file of the archive. header: offset of the header before its data; limit: where the directory begins."""

    name: bytes
    header: int
    size_bytes: int
    limit: int
    is_stored: bool


def read_directory(path: Path, file: BinaryIO, size_bytes: int) -> dict[bytes, Record]:
    """All records by name. The directory is at the end, so a partial download has none. Raises SwanError."""
    try:
        count, start, end = _find_directory(path, file, size_bytes)
        if count > _MAX_RECORDS or not 0 <= start <= end <= size_bytes:
            raise ValueError(f"a directory of {count:,} records in bytes {start:,} to {end:,}")
        file.seek(start)
        directory = file.read(end - start)
        records, at = {}, 0
        for _ in range(count):
            record, at = _read_entry(directory, at, start)
            if record.name in records:
                raise ValueError(f"two records {record.name[:200]!r}")
            records[record.name] = record
    except (ValueError, struct.error) as error:
        raise SwanError(f"{path}: damaged archive of {size_bytes:,} bytes ({error})") from None
    return records


def data_start(path: Path, file: BinaryIO, record: Record) -> int:
    """Where the data of a record begins, which is whole. Raises SwanError."""
    name = record.name[:200].decode("ascii", "backslashreplace")
    if not record.is_stored:
        raise SwanError(f"{path}: its record {name} is compressed or encrypted; save it again with torch.save")
    file.seek(record.header)
    header = file.read(_HEADER.size + len(record.name))
    if len(header) == _HEADER.size + len(record.name):
        signature, *_, name_bytes, extra_bytes = _HEADER.unpack_from(header)
        start = record.header + _HEADER.size + name_bytes + extra_bytes
        is_right = signature == b"PK\3\4" and name_bytes == len(record.name) and header.endswith(record.name)
        if is_right and start + record.size_bytes <= record.limit:
            return start
    raise SwanError(f"{path}: damaged archive (its record {name} is not where its directory says)")


def _find_directory(path: Path, file: BinaryIO, size_bytes: int) -> tuple[int, int, int]:
    """(records, first byte, end) of the directory."""
    tail_bytes = min(size_bytes, _END.size + _MAX_COMMENT_BYTES)
    file.seek(size_bytes - tail_bytes)
    tail = file.read(tail_bytes)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise SwanError(f"{path}: truncated, the archive's directory is not within its {size_bytes:,} bytes")
    _, _, _, _, count, directory_bytes, start, _ = _END.unpack_from(tail, at)
    if at >= _LOCATOR.size and tail.startswith(b"PK\6\7", at - _LOCATOR.size):
        long_end = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)[2]
        if long_end + _LONG_END.size > size_bytes:
            raise truncated(path, long_end + _LONG_END.size, size_bytes, "at least ")
        file.seek(long_end)
        signature, *_, count, directory_bytes, start = _LONG_END.unpack(file.read(_LONG_END.size))
        if signature != b"PK\6\6":
            raise ValueError("no directory where it is said to be")
    return count, start, start + directory_bytes


def _read_entry(directory: bytes, at: int, limit: int) -> tuple[Record, int]:
    """A record, and where the next one is told of."""
    fields = _ENTRY.unpack_from(directory, at)
    signature, _, _, flags, method, _, _, _, packed, size, name_bytes, extra_bytes, comment_bytes, *_, header = fields
    at += _ENTRY.size
    name, extra = directory[at : at + name_bytes], directory[at + name_bytes : at + name_bytes + extra_bytes]
    at += name_bytes + extra_bytes + comment_bytes
    if signature != b"PK\1\2" or at > len(directory):
        raise ValueError("a record that is not told of")
    size, packed, header = _long_numbers((size, packed, header), extra)
    is_stored = method == 0 and not flags & 1
    if header >= limit or is_stored and (size != packed or header + size > limit):
        raise ValueError(f"the record {name[:200]!r} of {size:,} bytes at {header:,}")
    return Record(name, header, size, limit, is_stored), at


def _long_numbers(numbers: tuple[int, int, int], extra: bytes) -> list[int]:
    """Those that do not fit in 32 bits are in a field of their own, in this order."""
    if _IN_EXTRA not in numbers:
        return list(numbers)
    at = 0
    while at + 4 <= len(extra):
        field, field_bytes = struct.unpack_from("<2H", extra, at)
        if field == _LONG_FIELD:
            count = numbers.count(_IN_EXTRA)
            found = iter(struct.unpack_from(f"<{count}Q", extra[at + 4 : at + 4 + field_bytes]))
            return [next(found) if number == _IN_EXTRA else number for number in numbers]
        at += 4 + field_bytes
    raise ValueError("a size that is not there")
