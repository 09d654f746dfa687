"""`bench router` runs: its pretend cluster speaks the router's protocol, and its tokenizer is one."""

import pytest

from tools.benchmarks import router
from tools.benchmarks.router import HEADER, Case, measured


@pytest.mark.parametrize("near", [False, True])
def test_every_figure_of_a_small_cluster_is_measured(
    near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TURNS", "PLACES", "ROUNDS", "WATCHERS", "DECISIONS"):
        monkeypatch.setattr(router, name, 2)
    line = measured(Case(workers=4, running=6, prompt=8, tokens=5, near=near))
    assert line[:2] == ["4", "6"]
    assert len(line) == len(HEADER)
