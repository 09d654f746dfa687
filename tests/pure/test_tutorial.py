"""docs/tutorial.md: what it quotes stands in the code, and what it tells you to type can be typed.

What its Python prints is checked by tests/torch/test_tutorial.py.
"""

import ast
import json
import re
import shlex
from collections.abc import Sequence

import click
import pytest

import tools.evaluation.__main__
import tools.lab.__main__
from baton.cli import main
from baton.server.schema import CompletionRequest
from tests.pure.tutorial import PAGE, ROOT, Box, boxes, session, stands

TEXT = PAGE.read_text(encoding="utf-8")
LONGEST_QUOTE = 8
BOXES = list(boxes(TEXT))
QUOTES = [box for box in BOXES if box.quotes is not None]
INLINE = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
OTHERS = {"head", "cmp", "echo", "kill", "."}  # nothing of ours to be wrong in them
ROOMS = {"lab": tools.lab.__main__.main, "eval": tools.evaluation.__main__.main}
PYTEST = {"-q", "-x", "-k"}


def commands_of(line: str) -> list[list[str]]:
    """The words of each command of a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&;|"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


COMMANDS = [
    command
    for box in BOXES
    if box.language == "sh"
    for line in box.lines
    for command in commands_of(line)
] + [shlex.split(each) for each in INLINE if each.startswith("python ")]


def check_options(command: click.Command, words: Sequence[str]) -> None:
    """A click.UsageError if the command, or the one below it, would refuse these words. Nothing runs."""
    context = command.make_context(command.name, list(words))
    if not isinstance(command, click.Group):
        return
    _, rest, _ = command.make_parser(context).parse_args(list(words))
    if rest:
        below = command.get_command(context, rest[0])
        assert below is not None, f"there is no command {rest[0]}"
        check_options(below, rest[1:])


def check_main(words: Sequence[str]) -> None:
    """`python main.py ...`; what is passed on is checked where it goes."""
    first = words[0] if words else ""
    if first == "bench":  # needs torch, so the source has to do
        source = (ROOT / "tools" / "benchmarks" / f"{words[1]}.py").read_text(encoding="utf-8")
        for word in words[2:]:
            assert not word.startswith("--") or f'"{word}"' in source, f"{word} of bench"
    elif first in ROOMS:
        check_options(ROOMS[first], words[1:])
    else:
        check_options(main.cli, words)


def check_command(words: Sequence[str]) -> None:
    """Could a reader type this?"""
    match list(words):
        case ["python", "main.py", *rest]:
            check_main(rest)
        case ["python", "-c", code]:
            ast.parse(code)
        case ["python", "-m", "pytest", *rest]:
            given = [word for word in rest if word.startswith("-")]
            assert set(given) <= PYTEST
            files = [word for word in rest if word.endswith(".py")]
            assert files
            assert all((ROOT / file).is_file() for file in files)
        case ["curl", *rest]:
            CompletionRequest.model_validate(json.loads(rest[rest.index("-d") + 1]))
        case ["pip", "install", "-r", file]:
            assert (ROOT / file).is_file()
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        case [name, *_]:
            assert name in OTHERS, f"{name}: what is that?"


@pytest.mark.parametrize("box", QUOTES, ids=lambda box: f"{box.quotes.name}: {box.lines[0][:30]}")
def test_a_quote_is_short_and_stands_in_the_code(box: Box) -> None:
    assert box.quotes is not None
    assert 0 < len(box.lines) <= LONGEST_QUOTE
    assert stands(box.lines, box.quotes.read_text(encoding="utf-8"))


def test_there_is_something_to_check() -> None:
    assert len(QUOTES) >= 4
    assert len(session(TEXT)) >= 10
    assert len(COMMANDS) >= 20


def test_a_quote_that_is_off_by_a_word_is_found() -> None:
    source = "def f():\n    a = 1\n    b = 2\n    c = 3\n"
    assert stands(("    a = 1", "    b = 2"), source)
    assert stands(("    a = 1", "    ...", "    c = 3"), source)
    assert not stands(("    a = 1", "    c = 3"), source)
    assert not stands(("    b = 2", "    ...", "    a = 1"), source)
    assert not stands(("    a = 12",), source)
    assert not stands(("a = 1",), source)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_a_command_can_be_typed(words: list[str]) -> None:
    check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "python main.py --no-such-option",
        "python main.py -b four",
        "python main.py infer --greedy",
        "python main.py no-such-command",
        "python main.py lab no-such-study",
        "python main.py eval perplexity --no-such-option",
        "python main.py bench step --no-such-option",
    ],
)
def test_a_command_that_is_wrong_is_found(line: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        check_command(shlex.split(line))


@pytest.mark.parametrize("box", session(TEXT), ids=lambda box: box.lines[0])
def test_python_is_python_and_can_be_pasted(box: Box) -> None:
    tree = ast.parse(box.typed)
    lines = box.typed.splitlines()
    for node in tree.body:  # the prompt wants an empty line behind a block, and none inside
        if isinstance(node, ast.For | ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno is not None
            assert lines[node.end_lineno : node.end_lineno + 1] in ([""], [])
            assert "" not in lines[node.lineno - 1 : node.end_lineno]


def test_every_link_leads_to_a_file() -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    missing = [each for each in targets if not (PAGE.parent / each).is_file()]
    assert targets
    assert not missing


def test_every_file_named_in_passing_exists() -> None:
    paths = [each for each in INLINE if re.fullmatch(r"[\w/]+/\w+\.\w+", each)]
    assert paths
    assert not [each for each in paths if not (ROOT / each).is_file()]


def test_every_option_named_in_passing_exists() -> None:
    known = {name for parameter in main.cli.params for name in parameter.opts}
    options = [each.split()[0] for each in INLINE if each.startswith("--")]
    assert options
    assert set(options) <= known


def test_every_function_said_to_be_in_a_file_is_there() -> None:
    said = re.findall(r"`(\w+)`\s+(?:in|\()\s*\[`[^`]+`\]\(\.\./([^)]+)\)", TEXT)
    assert said
    for name, file in said:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{name} in {file}"


def test_what_exercise_c_takes_away_is_there() -> None:
    assert "        if waiting_for:\n" in (ROOT / "baton/kv/blocks.py").read_text(encoding="utf-8")
