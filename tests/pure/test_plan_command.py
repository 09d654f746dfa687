"""`main.py plan`: traces in Mooncake's format, divisions of workers, and what it prints."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from baton.errors import InputError
from baton.plan.__main__ import main
from baton.plan.arrivals import poisson, read_trace
from baton.plan.frontier import divisions
from baton.plan.score import meets
from baton.plan.simulation import Answer, Arrival
from router.role_policy import RolePolicy


def written(folder: Path, *lines: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    )
    return path


def line(at: int, length: int, *ids: int, answer: int = 5) -> dict[str, object]:
    return {"timestamp": at, "input_length": length, "output_length": answer, "hash_ids": [*ids]}


def test_a_trace_keeps_times_lengths_and_shared_beginnings(tmp_path: Path) -> None:
    trace = written(
        tmp_path, line(3000, 1000, 46, 47), line(1000, 700, 46, 99, answer=7),
        {"timestamp": 5000, "input_length": 30, "output_length": 1}, "", line(9000, 30, 46),
    )  # fmt: skip
    first, second, third = read_trace(trace, most=3)
    assert [first.at, second.at, third.at] == [0.0, 2.0, 4.0]
    assert [len(each.prompt) for each in (first, second, third)] == [700, 1000, 30]
    assert [each.new_tokens for each in (first, second, third)] == [7, 5, 1]
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512] != second.prompt[512]
    assert third.prompt[0] != first.prompt[0]
    assert read_trace(trace, most=3, speed=2.0)[1].at == 1.0


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{", "line 2"),
        ("[1]", "line 2"),
        ({"timestamp": 1, "input_length": 3}, "output_length is missing"),
        (line(-1, 3), "timestamp must be a whole number from 0 on"),
        (line(1, 0), "input_length must be a whole number from 1 on"),
        ({"timestamp": 1, "input_length": 3, "output_length": True}, "output_length must be"),
        ({**line(1, 3), "hash_ids": ["a"]}, "hash_ids must be whole numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, why: str) -> None:
    with pytest.raises(InputError, match="trace") as error:
        read_trace(written(tmp_path, line(0, 3), bad), most=10)
    assert why in str(error.value)


def test_a_trace_without_requests_and_one_that_is_no_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no requests"):
        read_trace(written(tmp_path, ""), most=10)
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "none", most=10)


def test_every_division_is_tried_and_none_at_all_too() -> None:
    found = [str(each) for each in divisions(3)]
    assert found == ["0:3 colocated", "1:2 split", "1:2 adaptive", "2:1 split", "2:1 adaptive"]


def test_random_arrivals_are_the_same_for_one_seed() -> None:
    assert poisson(2.0, 9, prompt=20, new_tokens=4) == poisson(2.0, 9, prompt=20, new_tokens=4)
    lengths = [len(each.prompt) for each in poisson(2.0, 200, prompt=20, new_tokens=4)]
    assert (min(lengths), max(lengths)) == (10, 30)


def test_an_answer_meets_the_limits_or_does_not() -> None:
    asked = Arrival(1.0, (1, 2), 4)
    assert meets(Answer(asked, [1.5, 1.6, 1.7]), 0.5, 0.15)
    assert not meets(Answer(asked, [1.6, 1.7]), 0.5, 0.15)
    assert not meets(Answer(asked, [1.5, 1.7]), 0.5, 0.15)
    assert not meets(Answer(asked, []), 0.5, 0.15)
    assert not meets(Answer(asked, [1.5], failed="why"), 0.5, 0.15)


def test_the_command_prints_a_line_for_each_division_and_the_best() -> None:
    arguments = ["--slo-ttft", "0.5", "--slo-itl", "0.05", "--workers", "2", "--requests", "6"]
    ran = CliRunner().invoke(main, [*arguments, "--prompt", "100", "--new", "4"])
    assert ran.exit_code == 0, ran.output
    for policy in RolePolicy:
        assert str(policy) in ran.output
    assert "best: " in ran.output


def test_a_pool_that_is_too_small_for_a_request_is_named(tmp_path: Path) -> None:
    trace = written(tmp_path, line(0, 3000))
    arguments = [
        "--trace",
        str(trace),
        "--slo-ttft",
        "1",
        "--slo-itl",
        "1",
        "--pool-tokens",
        "1024",
    ]
    ran = CliRunner().invoke(main, arguments)
    assert isinstance(ran.exception, InputError)
    assert "raise --pool-tokens" in str(ran.exception)
