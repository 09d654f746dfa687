"""A damaged program file is refused when it is opened, and never read out of bounds; native code and
Python agree on every structure."""

import ctypes
import random
import tempfile
from collections.abc import Iterator

import pytest

from baton.engine.cpu import structures as native
from baton.engine.cpu.build import build, program_sources
from baton.engine.cpu.compile import compile_model
from baton.engine.cpu.forward import NativeRunner
from baton.engine.cpu.program import Program, checksum, declare
from baton.engine.errors import CompileError
from baton.engine.pool import Pool
from baton.kv.row import Logits, Row
from tests.torch.test_native_program import library, native_case

HUGE = (-1, -(2**62), 2**31, 2**62, 2**63 - 1)
LAST = Row([5, 6, 7], 0, [0, 1], Logits.LAST)


@pytest.fixture(scope="module")
def whole() -> bytes:
    """The demo-sized gpt2's program."""
    it = native_case("gpt2")
    with tempfile.TemporaryFile() as file:
        compile_model(file, library(), it.model, it.layout, it.model.dtype)
        file.seek(0)
        return file.read()


def opened(data: bytes) -> Program:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return Program(library(), file)


@pytest.mark.parametrize(("product", "cache"), [("bf16", "f32"), ("f32", "bf16")])
def test_a_library_without_the_types_of_a_program_refuses_it(
    whole: bytes, product: str, cache: str
) -> None:
    """Each type is a part that is compiled on its own and linked only where it is needed."""
    other = declare(build(program_sources([product], [cache]), "program-other"))
    with tempfile.TemporaryFile() as file:
        file.write(whole)
        file.flush()
        with pytest.raises(ValueError, match="built without a type"):
            Program(other, file)


def spec_of(data: bytes) -> native.Spec:
    return native.Spec.from_buffer_copy(data)


def array_of(data: bytes, name: str) -> tuple[int, ctypes.Array[ctypes.Structure]]:
    spec, kind = spec_of(data), native.ARRAYS[name]
    offset, count = getattr(spec, f"{name}s"), getattr(spec, f"{name}_count")
    return offset, (kind * count).from_buffer_copy(data, offset)


def sealed(data: bytearray) -> bytes:
    """With the checksum that belongs to what it says now, so that the other checks are reached."""
    spec = spec_of(bytes(data))
    parts = [bytes(data[spec.info : spec.info + spec.info_bytes])]
    parts += [bytes(array_of(bytes(data), name)[1]) for name in native.ARRAYS]
    spec.checksum = checksum(spec, parts)
    data[: ctypes.sizeof(spec)] = bytes(spec)
    return bytes(data)


def numbers(kind: type[ctypes.Structure], base: int = 0) -> Iterator[tuple[str, int, int]]:
    """Name, offset and bytes of each integer of a structure, those of the structures in it too."""
    for name, type_, *_ in kind._fields_:
        offset = base + getattr(kind, name).offset
        if issubclass(type_, ctypes.Structure):
            yield from ((f"{name}.{inner}", *rest) for inner, *rest in numbers(type_, offset))
        elif type_ is not ctypes.c_float and name not in ("unused", "window"):
            yield name, offset, ctypes.sizeof(type_)


def test_native_code_and_python_agree_on_every_structure() -> None:
    assert native.check_abi(library(), native.PROGRAM) is library()


@pytest.mark.parametrize("change", ["size", "offset", "code"])
def test_a_difference_is_a_clear_error(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "code":
        codes = (*native.CODES[1:], native.CODES[0])
        monkeypatch.setitem(native.ENUMS, "OpCode", codes)
        wrong = native.PROGRAM
    else:
        fields = list(native.Table._fields_)
        changed = [*fields, ("more", ctypes.c_int64)] if change == "size" else fields[::-1]
        table = type("Table", (ctypes.Structure,), {"_fields_": changed})
        wrong = tuple(table if each is native.Table else each for each in native.PROGRAM)
        monkeypatch.setattr(native, "PROGRAM", wrong)
    with pytest.raises(CompileError, match=r"disagree on (Table|OpCode)"):
        native.check_abi(library(), wrong)


def test_the_whole_file_is_accepted_and_so_is_a_resealed_one(whole: bytes) -> None:
    assert opened(whole).stages == opened(sealed(bytearray(whole))).stages


def test_a_file_that_is_cut_anywhere_is_refused(whole: bytes) -> None:
    cuts = {0, 1, 7, 8, ctypes.sizeof(native.Spec) - 1, ctypes.sizeof(native.Spec), len(whole) - 1}
    for cut in sorted(cuts | {random.Random(i).randrange(len(whole)) for i in range(20)}):
        with pytest.raises(ValueError, match=r"it is|it has"):
            opened(whole[:cut])
    with pytest.raises(ValueError, match="not as long as its head states"):
        opened(whole + b"\0")


def test_one_flipped_bit_anywhere_but_in_constants_is_noticed(whole: bytes) -> None:
    dice, spec = random.Random(3), spec_of(whole)
    spans = [(0, native.Spec.checksum.offset), (spec.info, spec.info_bytes)]
    spans += [
        (at, ctypes.sizeof(items)) for at, items in (array_of(whole, n) for n in native.ARRAYS)
    ]
    for begin, size in spans:
        for _ in range(25):
            damaged = bytearray(whole)
            damaged[begin + dice.randrange(size)] ^= 1 << dice.randrange(8)
            with pytest.raises(ValueError, match=r"\w"):
                opened(bytes(damaged))


@pytest.mark.parametrize("name", ["spec", *native.ARRAYS])
def test_a_number_out_of_bounds_is_refused_or_harmless(name: str, whole: bytes) -> None:
    """Each integer of each kind of structure, made absurd under a right checksum: the file is refused,
    or what it says still runs."""
    if name == "spec":
        places = [
            (field, at, size) for field, at, size in numbers(native.Spec) if field != "checksum"
        ]
    else:
        offset, items = array_of(whole, name)
        each = ctypes.sizeof(native.ARRAYS[name])
        chosen = sorted({0, len(items) // 2, len(items) - 1})
        places = [
            (f, offset + i * each + at, s)
            for i in chosen
            for f, at, s in numbers(native.ARRAYS[name])
        ]
    refused = 0
    for _, at, size in places:
        for value in HUGE:
            damaged = bytearray(whole)
            damaged[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
            try:
                found = opened(sealed(damaged))
            except (ValueError, OverflowError):
                refused += 1
                continue
            runner, layout = NativeRunner(found), native_case("gpt2").layout
            runner.run(Pool.private(layout, 2, runner.device), [LAST])
    assert refused >= len(places)
