"""docs/tutorial.md, read: its boxes, and which of them quote, which are typed and which are printed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"

BOX = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"\[`[^`]+`\]\(\.\./(?P<file>[^)]+)\):")  # a line of its own above a box
LEFT_OUT, PRINTED = "...", "#> "


@dataclass(frozen=True, slots=True)
class Box:
    """A fenced box. `quotes` is the file that it quotes, if it does."""

    language: str
    lines: tuple[str, ...]
    quotes: Path | None

    @property
    def typed(self) -> str:
        """The code of a Python box."""
        return "\n".join(line for line in self.lines if not line.startswith(PRINTED)) + "\n"

    @property
    def printed(self) -> list[str]:
        """What the code prints, as the box says."""
        return [line.removeprefix(PRINTED) for line in self.lines if line.startswith(PRINTED)]


def boxes(text: str) -> Iterator[Box]:
    """Every box of a page, in order."""
    for found in BOX.finditer(text):
        above = text[: found.start()].rstrip().rpartition("\n")[2]
        quoted = QUOTED.fullmatch(above)
        yield Box(
            found["language"],
            tuple(found["body"].splitlines()),
            ROOT / quoted["file"] if quoted else None,
        )


def session(text: str) -> list[Box]:
    """The boxes that one Python session is made of."""
    return [box for box in boxes(text) if box.language == "python" and box.quotes is None]


def stands(quoted: tuple[str, ...], source: str) -> bool:
    """Do these lines stand in the source as they are, one behind the other but for what `...` leaves
    out, and in this order?"""
    wanted = re.split(rf"\n *{re.escape(LEFT_OUT)}\n", "\n".join(quoted))
    at = 0
    for part in wanted:
        found = re.compile(rf"^{re.escape(part)}$", re.MULTILINE).search(source, at)
        if found is None:
            return False
        at = found.end()
    return True
