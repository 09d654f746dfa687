"""Compiles native code for this CPU at first use and caches the library.

    $XDG_CACHE_HOME or ~/.cache / baton / native / <name>-<hash>.so

The hash covers sources, headers, flags, the compiler and the CPU, so a stale library is never loaded.
CXX may contain flags; a target among them, as in CXX="g++ -march=x86-64-v3", replaces this CPU's. The
headers detect the target's features at compile time. If several processes start together, one
compiles and the others wait.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from baton.errors import BatonError

NATIVE = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
CONTRACT = "-ffp-contract=fast"
"""a * b + c becomes one fused operation if the CPU has it. By default g++ does so everywhere, but clang++
only within an expression. The flag is explicit because results must have the same bits."""
QUIET = "-Wno-psabi"
"""g++ warns about vectors wider than the target's registers. None crosses a library boundary here, and
the warnings would push the error out of SHOWN_LINES."""
FLAGS = ("-std=c++20", "-O3", CONTRACT, QUIET, "-shared", "-fPIC", "-pthread")
TARGET_FLAGS = ("-march=", "-mcpu=")
BUILD_TIMEOUT_S = 600  # a loaded machine may take minutes
SHOWN_LINES = 5  # of the compiler's output in an error message


class NoNative(BatonError):
    """Native code is not available; the caller falls back to torch and logs it once."""


class NoCompiler(NoNative):
    """No C++ compiler was found, or native code is switched off."""


class BuildFailed(NoNative):
    """The compiler does not run or fails, or its library cannot be loaded."""


def build(sources: Sequence[str], name: str) -> ctypes.CDLL:
    """The library built from these files of native/. Raises NoCompiler or BuildFailed."""
    if os.environ.get("BATON_NATIVE") == "0":
        raise NoCompiler("native code is switched off: unset BATON_NATIVE to use it")
    compiler = find_compiler()
    command = [*compiler, *FLAGS, *_target(compiler), *(str(NATIVE / each) for each in sources)]
    key = _key(sources, [*command, _run([*compiler, "--version"]), _cpu()])
    try:
        folder = cache_folder("native")
        library = folder / f"{name}-{key}.so"
        with (folder / f"{name}-{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                unfinished = library.with_suffix(f".{os.getpid()}.tmp")
                _run([*command, "-o", str(unfinished)])
                unfinished.replace(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildFailed(
            f"native code cannot be stored or loaded: {error}; set XDG_CACHE_HOME to a folder of "
            "your own that allows execution"
        ) from error


def find_compiler() -> list[str]:
    """The command in CXX, otherwise the first of COMPILERS on the PATH. Raises NoCompiler."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name in [wanted[0]] if wanted else COMPILERS:
        if path := shutil.which(name):
            return [path, *wanted[1:]]
    looked = f"CXX={wanted[0]}" if wanted else ", ".join(COMPILERS)
    raise NoCompiler(f"no C++ compiler ({looked}) was found: install g++ or clang++, or set CXX")


def _key(sources: Sequence[str], facts: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in sorted({*NATIVE.glob("*.h"), *(NATIVE / each for each in sources)}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def cache_folder(name: str) -> Path:
    """A cache folder that only its owner can write to, because its files are executed or mapped.
    PermissionError if others can write to it."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "baton" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by other users")
    return folder


def _run(command: Sequence[str]) -> str:
    """The command's output. BuildFailed with the first lines of its errors."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
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


def _target(compiler: Sequence[str]) -> list[str]:
    """The flag that targets this CPU, unless CXX names a target."""
    if any(word.startswith(TARGET_FLAGS) for word in compiler):
        return []
    return ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"]


def _cpu() -> str:
    """What -march=native depends on. Machines with different CPUs may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(fields)}))
