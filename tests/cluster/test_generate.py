"""`from baton import generate`: one call, its own processes, and nothing left of them."""

import tempfile
from pathlib import Path

import pytest

from baton import generate
from baton.errors import RequestError
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.processes import shared_memory, short_folder

GREEDY = SamplingParams(temperature=0)


def test_a_call_gives_the_calm_text_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = shared_memory()
    wanted = calm.answers(20, GREEDY)[0].text
    with short_folder() as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert generate("demo", calm.PROMPTS[0], 20, "cpu", sampling=GREEDY) == wanted
        with pytest.raises(RequestError, match="the context is 2,304"):
            generate("demo", calm.PROMPTS[0], 9_999, "cpu", colocated=True)
        assert list(Path(folder).iterdir()) == []
    assert shared_memory() == shared
