"""Libraries that a wheel ships, so that an installed package needs no compiler.

    engine/cpu/shipped / program.x86-64-v3.so ...  manifest.json

ship.py makes them when the wheel is built, for the TARGETS of that machine, and for arm64 if its
cross compiler is there. A library is used if the manifest has its hash, it was made from the sources
beside it, and this CPU has all features of its target. Otherwise native code is compiled as in a
checkout, and so it is if CXX names a compiler. The wheel stays one for every platform.
"""

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
SHIPPED = Path(__file__).parent / "shipped"
MANIFEST = "manifest.json"
V3 = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
V4 = (*V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of CPU: `needs` are names of /proc/cpuinfo."""

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]


TARGETS = (
    Target("x86-64-v3", "x86_64", ("-march=x86-64-v3",), V3),
    Target("x86-64-v4", "x86_64", ("-march=x86-64-v4",), V4),
    Target("x86-64-v4-vnni", "x86_64", ("-march=x86-64-v4", "-mavx512vnni"), (*V4, "avx512_vnni")),
    Target("arm64", "aarch64", ("-march=armv8-a",), ("asimd",)),
    Target("arm64-dotprod", "aarch64", ("-march=armv8.2-a+dotprod",), ("asimd", "asimddp")),
)


@dataclass(frozen=True, slots=True)
class Shipped:
    """A library as the manifest lists it."""

    library: str  # program or kernel
    target: str
    machine: str
    needs: tuple[str, ...]
    sha256: str

    @property
    def file(self) -> str:
        """Its name in SHIPPED."""
        return f"{self.library}.{self.target}.so"


def shipped_library(name: str) -> Path | None:
    """The best library `name` for this CPU; None if there is none, or it cannot be trusted."""
    if os.environ.get("CXX") or not (SHIPPED / MANIFEST).exists():
        return None
    try:
        manifest = json.loads((SHIPPED / MANIFEST).read_text())
        listed = [
            Shipped(**{**each, "needs": tuple(each["needs"])}) for each in manifest["libraries"]
        ]
        best = choose(listed, name, platform.machine(), cpu_features())
        if best is None:
            return None
        if manifest["sources"] != sources_digest():
            raise ValueError("they were made from other sources")
        path = SHIPPED / best.file
        if digest_of(path) != best.sha256:
            raise ValueError(f"{best.file} is not the one that was shipped")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the shipped libraries are not used: %s", error)
        return None
    return path


def choose(
    listed: Sequence[Shipped], name: str, machine: str, features: Collection[str]
) -> Shipped | None:
    """The library that uses most of the features this CPU has, and no others."""
    fitting = [
        each
        for each in listed
        if each.library == name and each.machine == machine and set(each.needs) <= set(features)
    ]
    return max(fitting, key=lambda each: len(each.needs), default=None)


def cpu_features() -> set[str]:
    """What /proc/cpuinfo lists: features that the CPU has and the kernel allows."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(match[1].split()) if match else set()


def sources_digest() -> str:
    """The hash of all native sources."""
    digest = hashlib.sha256()
    for path in sorted(NATIVE.iterdir()):
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
