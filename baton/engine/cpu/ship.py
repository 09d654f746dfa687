"""Makes the libraries that a wheel ships (shipped.py). setup.py runs this when the wheel is built.

BATON_WHEEL_TARGETS chooses the targets, with commas, or `none`. By default they are those of this
machine, and those for which Debian's cross compiler is installed. Without a compiler there are none.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from baton.engine.cpu.build import (
    FLAGS,
    KERNEL,
    NATIVE,
    NoCompiler,
    compile_library,
    find_compiler,
    program_sources,
    toolchain,
)
from baton.engine.cpu.shipped import MANIFEST, TARGETS, Shipped, Target, digest_of, sources_digest
from baton.errors import InputError

LIBRARIES = {
    "program": program_sources(("f32", "bf16", "i8", "w8"), ("f32", "bf16", "i8")),
    "kernel": KERNEL,
}
LINK_FLAGS = (
    "-static-libstdc++",
    "-static-libgcc",
)  # the user's machine may have older ones, or none
CROSS = {"aarch64": "aarch64-linux-gnu-g++", "x86_64": "x86_64-linux-gnu-g++"}
"""Debian's compilers for another machine."""


def ship(folder: Path, work: Path, say: Callable[[str], None]) -> None:
    """Make the libraries and their manifest in `folder`; parts are kept in `work`. BatonError if one that
    was asked for cannot be made."""
    names = os.environ.get("BATON_WHEEL_TARGETS")
    here = platform.machine()
    made: list[Shipped] = []
    work.mkdir(parents=True, exist_ok=True)
    for target in wanted_targets(names, here):
        try:
            compiler = _compiler_for(target, here)
        except NoCompiler as error:
            if names:
                raise
            say(f"no library for {target.name}: {error}")
            continue
        say(f"native code for {target.name}")
        folder.mkdir(parents=True, exist_ok=True)
        made += [_made(name, target, compiler, folder, work) for name in LIBRARIES]
    if made:
        about = {"sources": sources_digest(), "libraries": [asdict(each) for each in made]}
        (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")


def _made(name: str, target: Target, compiler: list[str], folder: Path, work: Path) -> Shipped:
    tools = toolchain(compiler, [*compiler[1:], *FLAGS, *target.flags])
    objects = {}
    for each in LIBRARIES[name]:
        source = NATIVE / each
        objects[work / f"{source.stem}-{tools.key([source])}.o"] = source
    library = folder / f"{name}.{target.name}.so"
    compile_library(tools, objects, library, link=LINK_FLAGS)
    return Shipped(name, target.name, target.machine, target.needs, digest_of(library))


def wanted_targets(names: str | None, machine: str) -> list[Target]:
    """`names`: of TARGETS, with commas, `none`, or None for all that can be made here. InputError for a
    name that is unknown."""
    if names == "none":
        return []
    if names:
        known = {each.name: each for each in TARGETS}
        if unknown := [each for each in names.split(",") if each not in known]:
            raise InputError(
                f"BATON_WHEEL_TARGETS names {', '.join(unknown)}; known are {', '.join(known)}, none"
            )
        return [known[each] for each in names.split(",")]
    return [
        each for each in TARGETS if each.machine == machine or shutil.which(CROSS[each.machine])
    ]


def _compiler_for(target: Target, machine: str) -> list[str]:
    """The compiler of this machine, or a cross compiler. NoCompiler."""
    if target.machine == machine:
        return find_compiler()
    if path := shutil.which(CROSS[target.machine]):
        return [path]
    raise NoCompiler(
        f"{CROSS[target.machine]} was not found: install it, or build on {target.machine}"
    )
