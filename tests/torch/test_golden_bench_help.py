"""The options of the benchmarks whose module imports torch. See tests/pure/test_golden_help.py."""

import pytest

from tests.pure.golden import check
from tests.pure.shown_commands import shown

NAMES = ("engine", "step", "precision", "handover", "gemm", "attention")


def test_options_of_benchmarks_are_the_recorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [f"python main.py bench {name}" for name in NAMES]
    check("commands_torch.json", {command: shown(monkeypatch, command) for command in commands})
