"""Which arms `bench engine` runs, and what it says of those that answer otherwise."""

from pathlib import Path

import click
import pytest

from benchmarks.engine import apart, arms_of


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
        (("ours", "vllm"), "python -m benchmarks.peers vllm installs it"),
        (("ours", "nonsense"), "'nonsense' is none of ours, ours P/D, transformers, ctranslate2"),
        (("transformers",), "--arm ours"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_with_the_way_out(
    peers: Path, wanted: tuple[str, ...], way_out: str
) -> None:
    with pytest.raises(click.BadParameter, match=way_out):
        arms_of(wanted, peers)


def test_an_arm_that_leaves_transformers_tokens_is_told_with_the_place() -> None:
    assert apart({"ours": 1.0, "a": 1.0}) == ""
    assert apart({"ours": 1.0, "a": 0.25, "b": 0.0}).endswith("a after 4, b after 0)")
