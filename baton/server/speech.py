"""Speech: what a model says in a chat, told apart while it comes: reasoning, then content. Pure.

    <think> 2 + 2 ... </think>  The answer is 4.
            reasoning            content

The prompt of some models ends with <think> (DeepSeek-R1), others write it themselves (Qwen3). White space
around the two parts belongs to neither. The text of an answer may come in pieces of any size: what may
become a tag is held back.
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

    def end(self) -> Said:
        """The answer has ended. What was held back."""
        held, self._held = self._held, ""
        if self._at is _At.THINKING:
            return Said(reasoning=held.rstrip())
        return Said(content="" if self._at is _At.BETWEEN else held)

    def _start(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(BEGIN):
            self._at, self._held = _At.THINKING, begun[len(BEGIN) :]
        elif not BEGIN.startswith(begun):
            self._at = _At.SPEAKING

    def _think(self) -> str:
        if not self._thought:
            self._held = self._held.lstrip()
        before, tag, after = self._held.partition(END)
        if tag:
            self._at, self._held = _At.BETWEEN, after
            found = before.rstrip()
        else:
            whole = self._held[: len(self._held) - begins_tag(self._held, END)]
            found = whole.rstrip()
            self._held = self._held[len(found) :]
        self._thought = self._thought or bool(found)
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
