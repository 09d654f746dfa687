"""Compiles native code for this CPU at first use and caches it.

Each source is compiled on its own, as many at once as there are cores, and kept (baton/cache.py); a
library is linked from those that it needs. So an interrupted build goes on where it was, and another
dtype compiles only what is new. A name holds a hash of all that matters: the sources' text, flags, the
compiler's version and the CPU, and no paths. CXX may contain flags; a target among them, as in
CXX="g++ -march=x86-64-v3", replaces this CPU's. The headers detect the target's features at compile
time. If several processes start together, one compiles and the others wait.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.cache import cache_folder, keep_within_limit, locked, part_of
from baton.engine.cpu.shipped import shipped_library
from baton.errors import BatonError
from baton.host import core_numbers
from baton.log import NOTICE

NATIVE = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
CONTRACT = "-ffp-contract=fast"
"""a * b + c becomes one fused operation if the CPU has it. By default g++ does so everywhere, but clang++
only within an expression. The flag is explicit because results must have the same bits."""
QUIET = "-Wno-psabi"
"""g++ warns about vectors wider than the target's registers. None crosses a library boundary here, and
the warnings would push the error out of SHOWN_LINES."""
FLAGS = ("-std=c++20", "-O2", CONTRACT, QUIET, "-fPIC", "-pthread")
"""Not -O3: where it helps, the sources say so (`#pragma GCC unroll`); elsewhere it takes twice as long to
compile code that is as fast (docs/performance.md)."""
TARGET_FLAGS = ("-march=", "-mcpu=")
BUILD_TIMEOUT_S = 600  # a loaded machine may take minutes
SHOWN_LINES = 5  # of the compiler's output in an error message
KERNEL = ("attention_f32.cpp", "attention_i8.cpp", "attention_bf16.cpp", "kernel.cpp")
"""The sources of the library of attention alone."""
GUARD = ("/bin/sh", "-c", "read _; kill -KILL 0")
"""Waits for the end of its stdin, then kills its process group."""

logger = logging.getLogger(__name__)


class NoNative(BatonError):
    """Native code is not available; the caller falls back to torch and logs it once."""


class NoCompiler(NoNative):
    """No C++ compiler was found, or native code is switched off."""


class BuildFailed(NoNative):
    """The compiler does not run or fails, or its library cannot be loaded."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A compiler, and the flags that make code for one target."""

    command: tuple[str, ...]  # with the target's flags
    identity: str  # equal for equal code: version, flags and CPU, no path

    def key(self, sources: Sequence[Path]) -> str:
        """The hash of what these sources become."""
        digest = hashlib.sha256(self.identity.encode())
        for path in (*sorted(NATIVE.glob("*.h")), *sources):
            digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:24]


def program_sources(products: Iterable[str], caches: Iterable[str]) -> tuple[str, ...]:
    """What runs programs with these types of weights (the names of TYPES) and caches (f32, bf16, i8)."""
    return (
        *(f"attention_{each}.cpp" for each in caches),
        *("program.cpp", "rows.cpp"),
        *(f"product_{each}.cpp" for each in products),
    )


def build(sources: Sequence[str], name: str) -> ctypes.CDLL:
    """The library `name` of these files of native/, those that take longest first. Raises NoCompiler or
    BuildFailed."""
    if os.environ.get("BATON_NATIVE") == "0":
        raise NoCompiler("native code is switched off: unset BATON_NATIVE to use it")
    if shipped := _shipped(name.partition("-")[0]):
        return shipped
    tools = this_cpu(find_compiler())
    paths = [NATIVE / each for each in sources]
    try:
        folder = cache_folder("native")
        library = folder / f"{name}-{tools.key(paths)}.so"
        with locked(library):
            if library.exists():
                return _loaded(library)
        objects = {folder / f"{each.stem}-{tools.key([each])}.o": each for each in paths}
        with ExitStack() as locks:
            for path in sorted(
                [library, *objects]
            ):  # in one order, so that nobody waits in a circle
                locks.enter_context(locked(path))
            if not library.exists():
                begun = time.monotonic()
                NOTICE.warning("compiling for this CPU, once")
                compile_library(tools, objects, library)
                NOTICE.warning("compiled for this CPU: %.0f s", time.monotonic() - begun)
            loaded = _loaded(library)
        keep_within_limit(library, *objects)
        return loaded
    except OSError as error:
        raise BuildFailed(
            f"native code cannot be stored or loaded: {error}; set XDG_CACHE_HOME to a folder of "
            "your own that allows execution"
        ) from error


def _shipped(name: str) -> ctypes.CDLL | None:
    """The library that came with the package, if this machine can load it."""
    if path := shipped_library(name):
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # a system library is older than that of the wheel's machine
            logger.warning("%s is not used: %s", path.name, error)
    return None


def _loaded(library: Path) -> ctypes.CDLL:
    os.utime(library)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink()  # the next start makes another one
        raise


def compile_library(
    tools: Toolchain, objects: dict[Path, Path], library: Path, *, link: Sequence[str] = ()
) -> None:
    """Compile the sources of `objects` that are missing, and link `library` with these flags too.
    BuildFailed."""
    missing = {made: source for made, source in objects.items() if not made.exists()}
    with _ending_together() as group, ThreadPoolExecutor(max(1, len(core_numbers()))) as pool:

        def make(made: Path, arguments: Sequence[str]) -> None:
            part = part_of(made)
            _run([*tools.command, *arguments, "-o", str(part)], group)
            part.replace(made)

        waiting = [
            pool.submit(make, made, ["-pipe", "-c", str(source)])
            for made, source in missing.items()
        ]
        for each in waiting:
            each.result()
        make(library, ["-shared", *link, *map(str, objects)])


@contextmanager
def _ending_together() -> Iterator[int]:
    """A process group for compilers: it is killed at the end of the block, and when this process ends, in
    whatever way. (A parent-death signal would reach g++, and not the compiler that g++ starts.)"""
    with subprocess.Popen(GUARD, stdin=subprocess.PIPE, process_group=0) as guard:
        yield guard.pid


def find_compiler() -> list[str]:
    """The command in CXX, otherwise the first of COMPILERS on the PATH. Raises NoCompiler."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name in [wanted[0]] if wanted else COMPILERS:
        if path := shutil.which(name):
            return [path, *wanted[1:]]
    looked = f"CXX={wanted[0]}" if wanted else ", ".join(COMPILERS)
    raise NoCompiler(f"no C++ compiler ({looked}) was found: install g++ or clang++, or set CXX")


def this_cpu(compiler: Sequence[str]) -> Toolchain:
    """The compiler for this CPU, unless its flags name a target."""
    flags, about = [*compiler[1:], *FLAGS], ""
    if not any(word.startswith(TARGET_FLAGS) for word in flags):
        flags.append("-mcpu=native" if _is_arm(platform.machine()) else "-march=native")
        about = _cpu()
    return toolchain(compiler, flags, about)


def toolchain(compiler: Sequence[str], flags: Sequence[str], about: str = "") -> Toolchain:
    """`flags`: with those of the compiler's own words. `about`: what else the code depends on."""
    version = _run([*compiler, "--version"])
    return Toolchain((compiler[0], *flags), "\0".join((*flags, version, about)))


def _is_arm(machine: str) -> bool:
    return machine in ("aarch64", "arm64")


def _run(command: Sequence[str], group: int | None = None) -> str:
    """The command's output. BuildFailed with the first lines of its errors."""
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, process_group=group
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(
            f"{command[0]} does not run: {error}; set CXX to another compiler"
        ) from error
    if ran.returncode:
        output = "\n".join((ran.stderr or ran.stdout).strip().splitlines()[:SHOWN_LINES])
        raise BuildFailed(
            f"{command[0]} failed ({ran.returncode}): {output or 'no output'}; "
            "set CXX to another compiler (g++ from 12 or clang++ from 15)"
        )
    return ran.stdout


def _cpu() -> str:
    """What -march=native depends on. Machines with different CPUs may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(fields)}))
