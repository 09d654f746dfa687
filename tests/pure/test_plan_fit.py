"""Step times learnt from a recorded run: those of the machine that served it, and good for other runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from baton.errors import InputError
from baton.plan.__main__ import main
from baton.plan.against import GOAL, Compared, compared, replayed, verdict
from baton.plan.arrivals import poisson, read_trace
from baton.plan.fit import fit
from baton.plan.machine import Machine
from baton.plan.recorded import Recorded, Setting, lines, read_recorded
from baton.plan.simulation import Answer, Simulation

TWO_CORES = Machine(0.011, 0.0003, 0.0009, cores=2)
TWO_GPUS = Machine(0.008, 0.00004, 0.0002, kv_bytes_per_s=2e9)
POOL = 1 << 16
REAL = Path(__file__).with_name("data") / "recorded_run.jsonl"
SPLIT, COLOCATED = Setting(1, 1), Setting(0, 1, role_policy="colocated")
ON_CORES = Setting(1, 1, cores=2)
CASES = [
    pytest.param(TWO_GPUS, SPLIT, 6.0, id="two devices"),
    pytest.param(TWO_CORES, ON_CORES, 2.0, id="shared cores"),
    pytest.param(TWO_CORES, replace(COLOCATED, cores=2), 2.0, id="colocated"),
    pytest.param(TWO_GPUS, Setting(1, 1, role_policy="adaptive"), 6.0, id="adaptive"),
    pytest.param(TWO_GPUS, Setting(2, 2), 12.0, id="two of each"),
]


def ran(
    machine: Machine, setting: Setting, rate: float, seed: int, *, count: int = 60
) -> list[Recorded]:
    """What a cluster with this machine would have recorded."""
    load = poisson(rate, count, prompt=300, new_tokens=40, seed=seed)
    answers = Simulation(machine, setting.rules, setting.shape(POOL)).run(load)
    return [_recorded(each) for each in answers]


def _recorded(answer: Answer) -> Recorded:
    at, took = answer.arrival.at, answer.timings
    assert took is not None
    began = at + took.queue_s + took.reserve_s
    return Recorded(
        at, len(answer.arrival.prompt), began, took.prefill_s, took.handover_s, tuple(answer.tokens)
    )


@pytest.mark.parametrize(("machine", "setting", "rate"), CASES)
def test_what_is_learnt_from_one_run_predicts_another(
    machine: Machine, setting: Setting, rate: float
) -> None:
    found = fit(ran(machine, setting, rate, seed=1), setting)
    unseen = ran(machine, setting, 0.7 * rate, seed=2)
    errors = compared(unseen, replayed(unseen, setting, found, POOL))
    assert all(each.good for each in errors), (found, errors)


def test_the_step_times_are_those_of_the_machine() -> None:
    found = fit(ran(TWO_GPUS, SPLIT, 6.0, seed=1), SPLIT)
    assert found.forward_s == pytest.approx(TWO_GPUS.forward_s, rel=0.15)
    assert found.token_s == pytest.approx(TWO_GPUS.token_s, rel=0.15)
    assert found.kv_bytes_per_s == pytest.approx(TWO_GPUS.kv_bytes_per_s, rel=0.01)


def test_of_a_run_on_a_machine_that_others_used_it_says_that_it_is_wrong() -> None:
    """GPT-2's shape, P/D on two cores, at a load of 8: ITL p50 doubled in the middle of it."""
    setting, recorded = read_recorded(REAL, option="--measured")
    half = len(recorded) // 2
    machine = fit(recorded[:half], setting)
    assert 0.01 < machine.forward_s < 1.0
    assert 1e-4 < machine.token_s < 1e-2
    assert machine.kv_bytes_per_s == 0.0
    answers = replayed(recorded, setting, machine, POOL)
    found = compared(recorded[half:], answers[half:])
    assert all(1 / 5 < 1 + each.error < 2 for each in found), found
    assert "GOAL MISSED" in verdict(found)


def test_where_memory_is_shared_nothing_is_sent() -> None:
    assert fit(ran(TWO_CORES, ON_CORES, 2.0, seed=1, count=20), ON_CORES).kv_bytes_per_s == 0.0


def test_a_recorded_run_is_read_as_it_was_written_and_is_a_trace_in_mooncakes_format(
    tmp_path: Path,
) -> None:
    path, recorded = tmp_path / "run.jsonl", ran(TWO_GPUS, SPLIT, 6.0, seed=1, count=12)
    path.write_text("".join(lines(SPLIT, recorded)))
    setting, found = read_recorded(path, option="--measured")
    assert setting == SPLIT
    for one, other in zip(recorded, found, strict=True):
        assert other.ttft_s == pytest.approx(one.ttft_s, abs=2e-6)
        assert other.gaps_s == pytest.approx(one.gaps_s, abs=2e-6)
        assert other.at == pytest.approx(one.at, abs=6e-4)
    assert [len(each.prompt) for each in read_trace(path, most=99)] == [
        r.prompt_tokens for r in found
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"timestamp": 1, "input_length": 3}', "tokens_ms is missing"),
        ('{"timestamp": 1, "input_length": 0, "tokens_ms": [1]}', "input_length must be 1 to"),
        ('{"timestamp": 1, "input_length": 3, "tokens_ms": []}', "tokens_ms must be times"),
        ('{"timestamp": 1, "input_length": 3, "tokens_ms": [2, 1]}', "tokens_ms must be times"),
        ('{"timestamp": NaN, "input_length": 3, "tokens_ms": [1]}', "timestamp must be"),
    ],
)
def test_a_bad_line_of_a_recorded_run_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"setting": {"prefills": 1, "decodes": 1}}\n' + line)
    with pytest.raises(InputError, match="bench disagg --traces") as error:
        read_recorded(path, option="--measured")
    assert why in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [{}, {"prefills": 1}, {"prefills": 1, "decodes": 0}, {"prefills": "1", "decodes": 1},
     {"prefills": 1, "decodes": 1, "role_policy": "?"}, {"prefills": 1, "decodes": 1, "more": 1}],
)  # fmt: skip
def test_a_bad_setting_is_refused(tmp_path: Path, setting: dict[str, object]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"setting": setting}))
    with pytest.raises(InputError, match="line 1"):
        read_recorded(path, option="--measured")


def test_too_few_requests_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(lines(SPLIT, ran(TWO_GPUS, SPLIT, 6.0, seed=1, count=3))))
    with pytest.raises(InputError, match="3 requests, and 10 are the least"):
        read_recorded(path, option="--measured")


def test_an_error_above_the_goal_is_said_plainly() -> None:
    good = Compared("TTFT p50", 0.1, 0.1 * (1 + 0.9 * GOAL))
    bad = Compared("ITL p99", 0.1, 0.13)
    assert verdict([good]) == "each of 1 figures within 10%: goal met"
    assert "GOAL MISSED: 1 of 2" in verdict([good, bad])
    assert "ITL p99 (+30%)" in verdict([good, bad])
    assert not Compared("ITL p50", 0.0, 0.1).good


def test_the_command_prints_errors_on_what_it_has_not_seen_and_the_frontier(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for path, seed in ((one, 1), (other, 2)):
        path.write_text("".join(lines(SPLIT, ran(TWO_GPUS, SPLIT, 6.0, seed=seed, count=24))))
    limits = ["--slo-ttft", "0.5", "--slo-itl", "0.05"]
    halves = CliRunner().invoke(main, ["--measured", str(one), *limits])
    assert halves.exit_code == 0, halves.output
    apart = CliRunner().invoke(main, ["--measured", str(other), "--fit-on", str(one), *limits])
    assert apart.exit_code == 0, apart.output
    assert "what it was fitted on" in halves.output
    assert "what it was fitted on" not in apart.output
    for each in (halves, apart):
        assert "what it has not seen" in each.output
        assert "figures" in each.output
        assert "best: " in each.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--fit-on", "RUN"], "give both"),
        (["--measured", "RUN", "--fit-on", "RUN"], "half is kept unseen"),
        (["--measured", "RUN", "--trace", "RUN"], "give one"),
        (["--measured", "RUN", "--fit-on", "ELSEWHERE"], "record both on one machine"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, arguments: list[str], why: str
) -> None:
    recorded = ran(TWO_GPUS, SPLIT, 6.0, seed=1, count=10)
    files = {"RUN": tmp_path / "run.jsonl", "ELSEWHERE": tmp_path / "elsewhere.jsonl"}
    files["RUN"].write_text("".join(lines(SPLIT, recorded)))
    files["ELSEWHERE"].write_text("".join(lines(ON_CORES, recorded)))
    given = [str(files.get(each, each)) for each in arguments]
    ended = CliRunner().invoke(main, [*given, "--slo-ttft", "1", "--slo-itl", "1"])
    assert why in str(ended.exception)
