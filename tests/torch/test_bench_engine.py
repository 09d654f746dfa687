"""The arms of `bench engine`, differing answers, and the roofline."""

from pathlib import Path

import click
import pytest

from tools.benchmarks.engine import Cell, apart, arms_of, child, roofline_of
from tools.measure.limits import Limits


@pytest.fixture
def peers(tmp_path: Path) -> Path:
    python = tmp_path / "ctranslate2" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    return tmp_path


def test_every_installed_peer_runs_beside_ours_and_transformers(peers: Path) -> None:
    assert arms_of((), peers) == ["ours", "ours P/D", "transformers", "ctranslate2"]


def test_named_arms_run_in_the_usual_order(peers: Path) -> None:
    assert arms_of(("ctranslate2", "ours"), peers) == ["ours", "ctranslate2"]


@pytest.mark.parametrize(
    ("wanted", "way_out"),
    [
        (("ours", "vllm"), "python -m tools.benchmarks.peers vllm installs it"),
        (
            ("ours", "nonsense"),
            "'nonsense' is not one of ours, ours P/D, transformers, ctranslate2",
        ),
        (("transformers",), "--arm ours"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_with_the_way_out(
    peers: Path, wanted: tuple[str, ...], way_out: str
) -> None:
    with pytest.raises(click.BadParameter, match=way_out):
        arms_of(wanted, peers)


def test_our_arms_start_from_any_folder(
    tmp_path: Path, peers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with child("transformers", peers) as arm:
        assert arm.ask(do="nothing") == {"failure": "KeyError: 'prompts'"}


def test_an_arm_that_leaves_transformers_tokens_is_told_with_the_place() -> None:
    assert apart({"ours": 1.0, "a": 1.0}) == ""
    assert apart({"ours": 1.0, "a": 0.25, "b": 0.0}).endswith("a after 4, b after 0)")


def test_the_roofline_is_that_of_the_whole_call_with_its_prefill() -> None:
    limits = Limits(read_gb_s=1e9, gemm_gflop_s={"float32": 100.0})  # memory costs nothing
    short, long = (roofline_of(Cell("gpt2", "float32", 4), limits, new) for new in (2, 1000))
    prefill, step = 4 / short, 4 / long  # seconds that an answer's token takes, nearly
    assert 20 * step < prefill  # 64 tokens' work for two tokens
    alone = roofline_of(Cell("gpt2", "float32", 0), limits, 2)
    assert alone == pytest.approx(512 / (2 * (512 * 85e6 + 39e6) / 100e9), rel=0.02)
