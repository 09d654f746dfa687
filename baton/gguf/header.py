"""Header: what a GGUF file says about itself, and where its tensors lie.

    magic, version, number of tensors, number of values     24 bytes
    values    key, type, value                              sizes, tokenizer, chat template
    tensors   name, dimensions, type, offset                in `general.alignment` bytes after the last
    data

The file is mapped and only its header is read. Every count and length is checked against the file and
against a limit before anything of that size is made, so a hostile file costs little time and memory.
The `gguf` package's own reader takes seconds for a large vocabulary and has no limits.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from baton.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
SIZES = {  # of a block, by the type's number: name, weights, bytes
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Named in the refusal; they are not read."""

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
MOST_VALUES = 1 << 16
MOST_TENSORS = 1 << 18
MOST_ITEMS = 1 << 22  # of all arrays together; the largest vocabularies have 2**18 tokens
LONGEST_NAME = 1 << 12
LONGEST_STRING = 1 << 24
MOST_DIMENSIONS = 4
LARGEST_ALIGNMENT = 1 << 16

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file. `shape` is in torch's order: the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    kind: int  # a key of SIZES
    path: Path
    offset: int  # from the beginning of the file
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata and tensors by name."""

    path: Path
    values: Mapping[str, Value]
    tensors: Mapping[str, Tensor]


def read_header(path: Path) -> Header:
    """The header of the file, or of all files that it was split into. Raises ModelError for a file that
    is broken, of another kind, or has tensors of a type that is not read."""
    first = _read(path)
    parts = first.values.get("split.count", 1)
    if parts == 1 or isinstance(parts, bool) or not isinstance(parts, int):
        return first
    tensors: dict[str, Tensor] = {}
    for part in _parts(path, parts):
        tensors |= _read(part).tensors
    expected = first.values.get("split.tensors.count")
    if len(tensors) != expected:
        raise ModelError(f"{path}: its {parts} parts hold {len(tensors)} tensors, not {expected}")
    return Header(path, first.values, tensors)


def _parts(path: Path, count: int) -> Iterator[Path]:
    """NAME-00001-of-0000N.gguf and the others, which lie beside it."""
    stem = path.name.removesuffix(SUFFIX)
    ending = f"-00001-of-{count:05d}"
    if not 1 < count < 100_000 or not stem.endswith(ending):
        raise ModelError(
            f"{path} is one of {count} parts: name the first one, which ends in {ending}{SUFFIX}"
        )
    for number in range(1, count + 1):
        part = path.with_name(f"{stem.removesuffix(ending)}-{number:05d}-of-{count:05d}{SUFFIX}")
        if not part.is_file():
            raise ModelError(f"{path} is incomplete: {part.name} is missing")
        yield part


def _read(path: Path) -> Header:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ModelError(f"{path} is not a GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


class _Reader:
    """Reads a mapped file from its beginning. Each method checks that what it reads lies inside."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._at = len(MAGIC)
        self._items = 0

    def header(self) -> Header:
        self._check_version(self._number("I"))
        tensors, count = self._number("Q"), self._number("Q")
        if count > MOST_VALUES or tensors > MOST_TENSORS:
            raise self._broken(f"it claims {tensors:,} tensors and {count:,} values")
        values: dict[str, Value] = {}
        for _ in range(count):
            key = self._text(LONGEST_NAME)
            if key in values:
                raise self._broken(f"it has {key[:80]} twice")
            values[key] = self._value(self._number("I"), key)
        found = [self._tensor() for _ in range(tensors)]
        return Header(self._path, values, self._placed(found, self._alignment(values)))

    def _check_version(self, version: int) -> None:
        if version in VERSIONS:
            return
        if not version & 0xFFFF:
            raise self._broken("it is in big-endian byte order, which is not read")
        raise self._broken(
            f"it is version {version}, only {VERSIONS[0]} and {VERSIONS[1]} are read"
        )

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))
        return int(value)

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._broken("it ends in the middle of its header")
        self._at += count
        return self._data[self._at - count : self._at]

    def _text(self, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise self._broken(f"a text in its header claims {length:,} bytes")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._broken("a text in its header is not UTF-8") from None

    def _value(self, kind: int, key: str) -> Value:
        if form := SCALARS.get(kind):
            (scalar,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))
            found: Value = scalar
            return found
        if kind == STRING:
            return self._text(LONGEST_STRING)
        if kind != ARRAY:
            raise self._broken(f"{key[:80]} has a value of the unknown type {kind}")
        each, count = self._number("I"), self._number("Q")
        self._items += count
        if self._items > MOST_ITEMS:
            raise self._broken(f"{key[:80]} claims {count:,} items")
        if each == STRING:
            return [self._text(LONGEST_STRING) for _ in range(count)]
        if each not in SCALARS:
            raise self._broken(f"{key[:80]} is a list of the unknown type {each}")
        form = f"<{count}{SCALARS[each]}"
        return list(struct.unpack(form, self._bytes(struct.calcsize(form))))

    def _alignment(self, values: Mapping[str, Value]) -> int:
        found = values.get("general.alignment", 32)
        powers = {1 << power for power in range(LARGEST_ALIGNMENT.bit_length())}
        if isinstance(found, bool) or not isinstance(found, int) or found not in powers:
            raise self._broken(f"general.alignment is {str(found)[:40]}, not a power of 2")
        return found

    def _tensor(self) -> Tensor:
        """A tensor whose offset counts from the beginning of the data."""
        name = self._text(LONGEST_NAME)
        dimensions = self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._broken(f"{name[:80]} has {dimensions:,} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in SIZES:
            called = OTHER_TYPES.get(kind, f"the unknown type {kind}")
            raise ModelError(
                f"{self._path} holds weights in {called} ({name[:80]}), which is not read: use a file "
                f"in {', '.join(each for each, _, _ in SIZES.values())}"
            )
        called, weights, size = SIZES[kind]
        if not prod(shape) or shape[-1] % weights:
            raise self._broken(f"{name[:80]} is {called} and has the shape {list(shape)}")
        return Tensor(name, shape, kind, self._path, offset, prod(shape) // weights * size)

    def _placed(self, found: list[Tensor], alignment: int) -> dict[str, Tensor]:
        """Each tensor with its place in the file; they may not overlap."""
        start = -(-self._at // alignment) * alignment
        placed: dict[str, Tensor] = {}
        end = 0
        for each in sorted(found, key=lambda tensor: tensor.offset):
            if each.name in placed:
                raise self._broken(f"it has {each.name[:80]} twice")
            if start + each.offset + each.nbytes > self._size:
                raise self._broken(
                    f"{each.name[:80]} needs bytes up to {start + each.offset + each.nbytes:,}, the file "
                    f"has {self._size:,}"
                )
            if each.offset < end:
                raise self._broken(f"{each.name[:80]} lies in another tensor")
            end = each.offset + each.nbytes
            placed[each.name] = Tensor(
                each.name, each.shape, each.kind, each.path, start + each.offset, each.nbytes
            )
        return placed

    def _broken(self, why: str) -> ModelError:
        return ModelError(f"{self._path} is a broken GGUF file: {why}; fetch it again")
