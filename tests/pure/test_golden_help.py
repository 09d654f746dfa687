"""The commands and their options, frozen: spellings, types, limits, defaults. Help texts may change.

A removed or changed option fails this test, and so does a new one until it is recorded (see golden.py).
"""

import pytest

from tests.pure.golden import check
from tests.pure.shown_commands import shown

COMMANDS = (
    "python main.py",
    "python main.py infer",
    "python main.py serve",
    "python main.py chat",
    "python main.py run-batch",
    "python main.py cache",
    "python main.py doctor",
    "python main.py bench",
    "python main.py bench disagg",
    "python main.py bench serve",
    "python main.py bench chat",
    "python main.py bench router",
    "python main.py bench telling",
    "python main.py lab",
    "python main.py eval",
    "python main.py keys",
    "python main.py convert",
    "python main.py quantize",
    "python -m router",
    "python -m prefill_worker",
    "python -m decode_worker",
    "python -m server",
)


def test_commands_and_options_are_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    check("commands.json", {command: shown(monkeypatch, command) for command in COMMANDS})
