"""Native code for another machine: compiled for every target of it, its numbers checked by an emulator.

    python -m tests.torch.emulated          arm64 (`make test-arm64`)

It needs Debian's cross compiler and qemu-user, and says which is missing. All sources of both libraries
are compiled and linked as for a wheel; native_numbers.cpp and native_stress.cpp run under the emulator,
and the table of structures must be that of structures.py.
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from baton.engine.cpu.build import FLAGS, NATIVE, compile_library, toolchain
from baton.engine.cpu.ship import CROSS, LIBRARIES, LINK_FLAGS
from baton.engine.cpu.shipped import TARGETS, Target
from baton.engine.cpu.structures import PROGRAM, abi_of

HERE = Path(__file__).parent
MACHINE = "aarch64"
EMULATOR = f"qemu-{MACHINE}"
ROOT = f"/usr/{MACHINE}-linux-gnu"  # where Debian's cross compiler has its libraries
PACKAGES = {CROSS[MACHINE]: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
PROGRAMS = ("native_numbers.cpp", "native_stress.cpp")


def missing() -> list[str]:
    """What is not installed, with the package that has it."""
    needed = [] if platform.machine() == MACHINE else [CROSS[MACHINE], EMULATOR]
    return [f"{name} (Debian: {PACKAGES[name]})" for name in needed if not shutil.which(name)]


def check(target: Target, compiler: str, work: Path) -> str | None:
    """What is wrong with this target's code; None: nothing. BuildFailed if it does not compile."""
    flags = [*FLAGS, *target.flags]
    tools = toolchain([compiler], flags)
    for name, sources in LIBRARIES.items():
        objects = {work / f"{target.name}-{Path(each).stem}.o": NATIVE / each for each in sources}
        compile_library(tools, objects, work / f"{name}.{target.name}.so", link=LINK_FLAGS)
    for source in PROGRAMS:
        program = work / f"{target.name}-{Path(source).stem}"
        subprocess.run([compiler, *flags, str(HERE / source), "-o", str(program)], check=True)
        ran = subprocess.run([*emulator(), str(program)], capture_output=True, text=True)
        if ran.returncode:
            return f"{source}: {ran.stderr.strip() or f'ended with {ran.returncode}'}"
        lines = ran.stdout.splitlines()
        entries = [line.split()[1:] for line in lines if line.startswith("abi ")]
        if entries and {name: int(value) for name, value in entries} != abi_of(PROGRAM):
            return "its structures are not those of structures.py"
        print(*(line for line in lines if not line.startswith("abi ")), sep="\n")
    return None


def emulator() -> list[str]:
    """What goes before a program of MACHINE."""
    return [] if platform.machine() == MACHINE else [EMULATOR, "-L", ROOT]


def main() -> None:
    """All targets of MACHINE. Exits with 2 if a tool is missing, with 1 at the first fault."""
    if lacking := missing():
        print(f"error: not installed: {', '.join(lacking)}", file=sys.stderr)
        sys.exit(2)
    compiler = "c++" if platform.machine() == MACHINE else CROSS[MACHINE]
    with tempfile.TemporaryDirectory() as folder:
        for target in (each for each in TARGETS if each.machine == MACHINE):
            print(f"{target.name}: {' '.join(target.flags)}", flush=True)
            if fault := check(target, compiler, Path(folder)):
                print(f"error: {target.name}: {fault}", file=sys.stderr)
                sys.exit(1)


if __name__ == "__main__":
    main()
