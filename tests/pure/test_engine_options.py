"""The options of an engine worker, and the ones that it cannot take."""

from pathlib import Path
from typing import Any

import click
import pytest

from baton.errors import InputError
from decode_worker.__main__ import main
from decode_worker.upstream.options import EngineOptions, read_engine_options
from decode_worker.upstream.process import _key

ROUTER = ["--router", "ipc:///tmp/r.sock"]
ENGINE = [*ROUTER, "--engine", "openai", "--upstream", "http://gpu7:8000"]


def read(*arguments: str) -> tuple[EngineOptions | None, dict[str, Any]]:
    context = main.make_context("decode_worker", list(arguments))
    given = dict(context.params)
    with context:
        return read_engine_options(context, given), given


def test_an_upstream_and_how_it_is_asked(tmp_path: Path) -> None:
    engine, _ = read(
        *ENGINE, "--upstream-model", "m", "--upstream-kind", "vllm", "--upstream-timeout", "7",
        "--max-num-seqs", "9", "--upstream-key-file", str(tmp_path / "key"),
    )  # fmt: skip
    assert engine == EngineOptions("http://gpu7:8000", "m", "vllm", tmp_path / "key", 7.0, 9)


def test_a_worker_of_our_own_sees_none_of_them() -> None:
    engine, given = read(*ROUTER, "--device", "cpu")
    assert engine is None
    assert not [name for name in given if "engine" in name or "upstream" in name]


def test_options_that_both_have() -> None:
    engine, given = read(*ENGINE, "--model", "demo", "--max-model-len", "256", "--name", "e")
    assert engine is not None
    assert (given["model"], given["max_model_len"], given["name"]) == ("demo", 256, "e")


WRONG = [
    ([*ROUTER, "--engine", "openai"], "--upstream http"),
    ([*ROUTER, "--upstream", "http://gpu7"], "--engine openai"),
    ([*ROUTER, "--upstream-timeout", "3"], "--engine openai"),
    ([*ENGINE, "--device", "cuda:0"], "--device"),
    ([*ENGINE, "--kv-host", "10.0.0.2"], "--kv-host"),
    ([*ENGINE, "--speculative-model", "ngram"], "--speculative-model"),
    ([*ENGINE, "--no-enable-prefix-caching"], "--prefix-caching"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_options_that_do_not_go_together(arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(*arguments)


@pytest.mark.parametrize("timeout", ["0", "nan", "inf"])
def test_a_timeout_that_is_none(timeout: str) -> None:
    with pytest.raises(click.BadParameter):
        read(*ENGINE, "--upstream-timeout", timeout)


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert _key(file) == "secret"
    assert _key(None) == ""
    for text in ("", "two words", "clé", "a\x01b"):
        file.write_text(text)
        with pytest.raises(InputError, match="one key"):
            _key(file)
    with pytest.raises(InputError, match="cannot be read"):
        _key(tmp_path / "none")
