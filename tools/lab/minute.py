"""The picture of docs/one-minute.md, from the recorded run of the disaggregation study.

    python -m tools.lab.minute        docs/lab-sample/disagg.jsonl to docs/one-minute.svg

Every tick is a token of that run at the time at which it reached the client. It plays once, in real time,
and stays as the whole picture; a viewer that does not animate shows the whole picture at once.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from baton.package import ROOT
from tools.lab.phrasing import number
from tools.measure.split import COLOCATED, PD

RUN = ROOT / "docs" / "lab-sample" / "disagg.jsonl"
PICTURE = ROOT / "docs" / "one-minute.svg"
SECONDS = 5.4  # shown: the first long prompt, until the second arrives
SHOWN = {
    PD: "Apart, prefill in one process and decode in another",
    COLOCATED: "Together, in one process",
}
WIDTH, LEFT, RIGHT = 920, 150, 20
LANE, PANEL, TOP = 15, 206, 34
PREFILL, DECODE, WAIT = "#b34d00", "#1b6ca8", "#fbe0d0"
WAITED_S = 0.4  # a gap that is marked
CSS = """text{font:14px system-ui,sans-serif;fill:#222}.small{font-size:13px;fill:#444}
.title{font-weight:600;font-size:16px}.in{fill:#fff}"""


@dataclass(frozen=True, slots=True)
class Line:
    """One request: when it arrived and when its tokens came, in seconds from the beginning of the run."""

    prompt_tokens: int
    arrived: float
    tokens: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """What is drawn of one arm: the first long prompt, and the streams beside it."""

    title: str
    apart: bool
    prompt: Line
    streams: tuple[Line, ...]

    @property
    def longest(self) -> float:
        """The longest time between two tokens of a stream, in seconds."""
        return max(b - a for each in self.streams for a, b in gaps(each.tokens))


def arms(lines: Iterable[str]) -> list[Arm]:
    """The arms of SHOWN, from the first round. Raises ValueError for a record without them."""
    found: dict[str, list[Line]] = {}
    for raw in map(json.loads, lines):
        if raw["what"] == "tokens" and raw["round"] == 0:
            line = Line(raw["prompt_tokens"], raw["arrived"], tuple(raw["at"]))
            found.setdefault(raw["arm"], []).append(line)
    if missing := [name for name in SHOWN if name not in found]:
        raise ValueError(f"the record has no tokens of {' and '.join(missing)}")
    made = []
    for name, title in SHOWN.items():
        longest = max(each.prompt_tokens for each in found[name])
        long = [each for each in found[name] if each.prompt_tokens == longest]
        streams = tuple(each for each in found[name] if each.prompt_tokens < longest)
        made.append(Arm(title, name == PD, min(long, key=lambda each: each.arrived), streams))
    return made


def gaps(tokens: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Successive tokens, as far as they are shown."""
    shown = [at for at in tokens if at <= SECONDS]
    yield from pairwise(shown)


def picture(drawn: Sequence[Arm]) -> str:
    """The SVG."""
    height = TOP + PANEL * len(drawn) + 30
    inside = WIDTH - LEFT - RIGHT
    parts = [_panel(arm, TOP + PANEL * place) for place, arm in enumerate(drawn)]
    waits = " and ".join(f"{number(arm.longest)} s ({arm.title.lower()})" for arm in drawn)
    about = (
        f"Answers are being written when a long prompt arrives. Longest wait for a token: {waits}."
    )
    clip = (
        f'<clipPath id="until"><rect x="{LEFT}" y="0" width="{inside}" height="{height}">'
        f'<animate attributeName="width" from="0" to="{inside}" dur="{SECONDS}s" fill="freeze"/>'
        "</rect></clipPath>"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            'aria-labelledby="name about"><title id="name">Prefill and decode, apart and together'
            "</title>"
            f'<desc id="about">{escape(about)}</desc>',
            f"<style>{CSS}</style>",
            f"<defs>{clip}</defs>",
            f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
            _key(),
            *parts,
            _axis(height),
            "</svg>\n",
        ]
    )


def _x(seconds: float) -> str:
    return f"{LEFT + (WIDTH - LEFT - RIGHT) * seconds / SECONDS:.1f}"


def _wide(seconds: float) -> str:
    return f"{(WIDTH - LEFT - RIGHT) * seconds / SECONDS:.1f}"


def _key() -> str:
    """What the colours are."""
    return (
        f'<rect x="{LEFT}" y="10" width="26" height="12" fill="{PREFILL}"/>'
        f'<text class="small" x="{LEFT + 32}" y="21">prefill of the long prompt</text>'
        f'<path d="M{LEFT + 237} 10v12" stroke="{DECODE}" stroke-width="3"/>'
        f'<text class="small" x="{LEFT + 246}" y="21">a token of an answer (decode)</text>'
        f'<rect x="{LEFT + 472}" y="10" width="26" height="12" fill="{WAIT}"/>'
        f'<text class="small" x="{LEFT + 504}" y="21">a reader waits</text>'
    )


def _panel(arm: Arm, top: int) -> str:
    first = arm.prompt.tokens[0]
    bar, lanes = top + 36, top + 66
    tokens = f"{arm.prompt.prompt_tokens:,} tokens"
    took = f"its first token after {number(first - arm.prompt.arrived)} s"
    parts = [
        f'<text class="title" x="12" y="{top + 24}">{escape(arm.title)}: longest wait for a token '
        f"{number(arm.longest)} s</text>",
        f'<text class="small" x="12" y="{bar + 14}">a long prompt</text>',
        f'<text class="small" x="12" y="{lanes + LANE * len(arm.streams) // 2 + 4}">'
        f"{len(arm.streams)} answers</text>",
        '<g clip-path="url(#until)">',
        f'<rect x="{_x(arm.prompt.arrived)}" y="{bar}" width="{_wide(first - arm.prompt.arrived)}" '
        f'height="20" fill="{PREFILL}"/>',
        f'<text class="small in" x="{float(_x(arm.prompt.arrived)) + 8:.1f}" y="{bar + 15}">'
        f"{tokens}; {took}</text>",
    ]
    if arm.apart:
        parts.append(
            f'<text class="small in" x="{float(_x(first)) - 8:.1f}" y="{bar + 15}" text-anchor="end">'
            "then its KV cache is handed over ↓</text>"
        )
    for place, stream in enumerate(arm.streams):
        y = lanes + LANE * place
        parts += [
            f'<rect x="{_x(a)}" y="{y}" width="{_wide(b - a)}" height="{LANE - 3}" fill="{WAIT}"/>'
            for a, b in gaps(stream.tokens)
            if b - a > WAITED_S
        ]
        ticks = "".join(f"M{_x(at)} {y}v{LANE - 3}" for at in stream.tokens if at <= SECONDS)
        parts.append(f'<path d="{ticks}" stroke="{DECODE}" stroke-width="2.4"/>')
    return "\n".join([*parts, "</g>"])


def _axis(height: int) -> str:
    marks = [
        f'<path d="M{_x(second)} {height - 32}v6" stroke="#888"/>'
        f'<text class="small" x="{_x(second)}" y="{height - 12}" text-anchor="middle">{second} s</text>'
        for second in range(int(SECONDS) + 1)
    ]
    line = f'<path d="M{LEFT} {height - 32}H{WIDTH - RIGHT}" stroke="#888"/>'
    return line + "".join(marks)


def main(run: Path = RUN, target: Path = PICTURE) -> None:
    """Draw the recorded run."""
    with run.open(encoding="utf-8") as lines:
        target.write_text(picture(arms(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
