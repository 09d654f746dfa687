"""Speech: what a model says in a chat, told apart while it comes: reasoning, then content. Pure.

    <think> 2 + 2 ... </think>  The answer is 4.
            reasoning            content

The prompt of some models ends with <think> (DeepSeek-R1), others write it themselves (Qwen3). White space
around the two parts belongs to neither. The text of an answer may come in pieces of any size: what may
become a tag is held back. White space, which may have any length, stands in a list beside it, so that
nothing long is looked at again with every piece.
"""

from dataclasses import dataclass
from enum import Enum, auto

BEGIN, END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Said:
    """New text of both kinds."""

    reasoning: str = ""
    content: str = ""


class _At(Enum):
    START = auto()  # nothing but white space yet
    THINKING = auto()
    BETWEEN = auto()
    SPEAKING = auto()


class Speech:
    """The text of one answer. `begun`: it begins within the reasoning."""

    def __init__(self, *, begun: bool) -> None:
        self._at = _At.THINKING if begun else _At.START
        self._held = ""
        self._gap: list[str] = []  # white space before that, not told either
        self._thought = False  # some reasoning was told

    def take(self, text: str) -> Said:
        """New text. What it completes."""
        self._held += text
        reasoning = content = ""
        if self._at is _At.START:
            self._start()
        if self._at is _At.THINKING:
            reasoning = self._think()
        if self._at is _At.BETWEEN:
            self._held = self._held.lstrip()
            self._at = _At.SPEAKING if self._held else _At.BETWEEN
        if self._at is _At.SPEAKING:
            content, self._held = self._held, ""
        return Said(reasoning, content)

    @property
    def held(self) -> int:
        """Characters that are looked at again with the next piece."""
        return len(self._held)

    def end(self) -> Said:
        """The answer has ended. What was held back."""
        held, self._held = self._with_gap(self._held), ""
        if self._at is _At.THINKING:
            return Said(reasoning=held.rstrip())
        return Said(content="" if self._at is _At.BETWEEN else held)

    def _with_gap(self, text: str) -> str:
        text = "".join((*self._gap, text))
        self._gap = []
        return text

    def _start(self) -> None:
        begun = self._held.lstrip()
        self._gap.append(self._held[: len(self._held) - len(begun)])
        self._held = begun
        if begun.startswith(BEGIN):
            self._at, self._held = _At.THINKING, begun[len(BEGIN) :]
            self._gap = []
        elif not BEGIN.startswith(begun):
            self._at, self._held = _At.SPEAKING, self._with_gap(begun)

    def _think(self) -> str:
        if not self._thought:
            self._held = self._held.lstrip()
        at = self._held.find(END)
        length = at if at >= 0 else len(self._held) - begins_tag(self._held, END)
        whole, self._held = self._held[:length], self._held[length:]
        told = whole.rstrip()
        found = self._with_gap(told) if told else ""
        self._thought = self._thought or bool(found)
        if at >= 0:
            self._at, self._held, self._gap = _At.BETWEEN, self._held[len(END) :], []
        else:
            self._gap.append(whole[len(told) :])
        return found


def begins_tag(text: str, tag: str) -> int:
    """How many characters at the end of the text begin the tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


def told_apart(text: str, *, begun: bool) -> Said:
    """Of a whole answer."""
    speech = Speech(begun=begun)
    first, last = speech.take(text), speech.end()
    return Said(first.reasoning + last.reasoning, first.content + last.content)


def begins(prompt: str) -> bool:
    """Is the beginning of the reasoning the last that the prompt says?"""
    return prompt.rstrip().endswith(BEGIN)


def is_open(said: str, prompt: str) -> bool:
    """Does what follows `said`, an assistant's text at the end of the prompt, stand within its reasoning?
    The template may have begun that before it. Others in the prompt may speak of the tags."""
    begun = begins(prompt.rstrip().removesuffix(said.strip()))
    return (begun or said.lstrip().startswith(BEGIN)) and END not in said
