"""A path that leads nowhere: up to where it exists, and what stands there under a similar name."""

import difflib
from contextlib import suppress
from itertools import islice
from pathlib import Path

MOST_NAMES = 10_000  # of a folder, that are compared with a name


def no_such_path(name: str) -> str | None:
    """What to say of a model's path of which the end is missing. None if it is no path: a plain name, or
    two with one slash between, as Hugging Face's ids are, unless the first is a folder here."""
    path = Path(name).expanduser()
    is_path = name.startswith(("/", ".", "~")) or len(path.parts) > 2 or name.endswith("/")
    if not is_path and not (len(path.parts) == 2 and path.parent.is_dir()):
        return None
    begin, missing = _where_it_ends(path)
    if not begin.is_dir():
        return f"there is no model {name!r}: {begin} is a file, not a folder"
    here = "this folder" if begin == Path() else str(begin)
    names: list[str] = []
    with suppress(OSError):  # a folder that may not be listed: no guess
        names += (each.name for each in islice(begin.iterdir(), MOST_NAMES))
    close = difflib.get_close_matches(missing, names, n=1)
    guess = f"; did you mean {begin / close[0]}?" if close else ""
    return f"there is no model {name!r}: {here} has no {missing!r}{guess}"


def _where_it_ends(path: Path) -> tuple[Path, str]:
    """The last part of a path that exists, and the name that is missing in it."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    return missing.parent, missing.name
