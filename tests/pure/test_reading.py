"""docs/reading.md: fifteen files that tell how a request is served. The list, its order and its size."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reading.md"

FILES = (
    "baton/wire/node.py",
    "baton/lifecycle.py",
    "router/requests.py",
    "router/admission.py",
    "router/ledger.py",
    "router/scheduling.py",
    "router/placement.py",
    "baton/kv/blocks.py",
    "prefill_worker/worker.py",
    "prefill_worker/filling.py",
    "baton/engine/runner.py",
    "baton/transfer/base.py",
    "decode_worker/worker.py",
    "decode_worker/runs.py",
    "decode_worker/decoding.py",
)
BUDGET = 2095
"""Lines of code in all of them. Whoever needs more moves something out that a reader can do without."""

LARGEST = 280
"""Lines of code in one of them: what can be read in one sitting."""


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    passed_over: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            assert text.end_lineno is not None
            passed_over.update(range(text.lineno, text.end_lineno + 1))
    return sum(
        1
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in passed_over
    )


def table() -> list[tuple[str, str, str]]:
    """Number, file and remark of every row."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(r"^\| (\d+) \| `([^`]+)` \| (.+) \|$", text, flags=re.MULTILINE)


def test_the_table_lists_the_files_in_their_order() -> None:
    assert [(int(number), file) for number, file, _ in table()] == [*enumerate(FILES, 1)]


def test_every_file_is_there_and_says_what_it_is() -> None:
    for file in FILES:
        assert ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))), file


def test_functions_that_the_table_names_are_there() -> None:
    for _, file, remark in table():
        for name in re.findall(r"`(\w+)\(\)`", remark):
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}: {name}"


def test_it_can_be_read_in_an_afternoon() -> None:
    lines = {file: code_lines(ROOT / file) for file in FILES}
    assert sum(lines.values()) <= BUDGET, lines
    assert max(lines.values()) <= LARGEST, lines
