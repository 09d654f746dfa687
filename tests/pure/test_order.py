"""The order in which files of tests begin."""

from collections import Counter
from pathlib import Path

from tests.order import COMPUTES, STARTS_PROCESSES, in_order

ROOT = Path(__file__).resolve().parents[2]


def test_files_that_come_first_are_there_and_named_once() -> None:
    named = Counter([*STARTS_PROCESSES, *COMPUTES])
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert set(named.values()) == {1}


def test_long_files_come_first_in_turns_and_tests_of_a_file_stay_together() -> None:
    first, second = STARTS_PROCESSES[:2]
    other, last = COMPUTES[0], "tests/pure/test_of_no_length.py"
    files = [last, second, other, other, first, last, first]
    assert [files[number] for number in in_order(files)] == [
        *(other, other, first, first),
        *(second, last, last),
    ]
    assert in_order(files) == [2, 3, 4, 6, 1, 0, 5]
