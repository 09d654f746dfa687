"""Evaluation: one run of the command. Scores the subject, prints each result and keeps it for --json."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
from tqdm import tqdm

from baton.errors import InputError
from baton.model_files import ModelFiles
from baton.text import Tokenizer
from tools.evaluation import report
from tools.evaluation.bundle import Task
from tools.evaluation.core import first_tokens, run_task
from tools.evaluation.data import Pair
from tools.evaluation.generation import write
from tools.evaluation.perplexity import score_texts
from tools.evaluation.subject import Subject

T = TypeVar("T")


@dataclass(slots=True)
class Evaluation:
    """A subject and its results so far."""

    subject: Subject
    files: ModelFiles
    tokenizer: Tokenizer
    settings: Mapping[str, Any]
    parts: dict[str, report.Json] = field(default_factory=dict)

    def perplexity(
        self, name: str, texts: Sequence[str], *, window: int | None, stride: int | None, end: bool
    ) -> None:
        """Perplexity of the texts."""
        found = score_texts(
            self.subject, self.tokenizer, texts, window=window, stride=stride,
            end=self._end_token() if end else None, bar=progress("perplexity", "window"),
        )  # fmt: skip
        click.echo(f"\n{report.perplexity_table(name, found, self._call)}")
        self.parts["perplexity"] = {"of": name, "end_token": end} | report.perplexity_json(found)

    def generation(self, name: str, pairs: Sequence[Pair], *, new_tokens: int) -> None:
        """Continuations against their references."""
        found = write(
            self.subject, self.tokenizer, pairs, new_tokens=new_tokens,
            bar=progress("generation", "text"),
        )  # fmt: skip
        click.echo(f"\n{report.generation_table(name, found, self._call)}")
        self.parts["generation"] = {"of": name} | report.generation_json(found)

    def core(self, name: str, tasks: Sequence[Task], *, bos: bool) -> None:
        """CORE-style tasks."""
        begin = self._bos() if bos else first_tokens(self.tokenizer)
        results = []
        for task in tasks:
            bar = progress(task.label, "example")
            results.append(run_task(self.subject, self.tokenizer, task, begin=begin, bar=bar))
        click.echo(f"\n{report.core_table(results, self._call)}")
        self.parts["core"] = {"bundle": name, "begin_tokens": begin} | report.core_json(results)

    def save(self, file: Path | None) -> None:
        """Write all numbers, if a file is given."""
        if file is not None:
            report.save(report.whole(self.subject.about, self.settings, self.parts), file)
            click.echo(f"\nall numbers: {file}")

    @property
    def _call(self) -> str:
        return self.subject.about.call

    def _end_token(self) -> int:
        if not self.files.eos_token_ids:
            raise InputError(f"{self.files.name} has no end token: run without --end-token")
        return self.files.eos_token_ids[0]

    def _bos(self) -> list[int]:
        for settings in (self.files.config, self.files.generation_config):
            if isinstance(found := settings.get("bos_token_id"), int):
                return [found]
        raise InputError(f"{self.files.name} has no bos_token_id: run without --bos")


def progress(what: str, unit: str) -> Callable[[Iterator[T], int], Iterable[T]]:
    """A bar on stderr, where that is a terminal."""

    def bar(running: Iterator[T], total: int) -> Iterable[T]:
        return tqdm(running, what, total, unit=unit, leave=False, disable=None, file=sys.stderr)

    return bar
