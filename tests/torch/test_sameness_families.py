"""Every family: disaggregated = colocated = transformers.generate, token for token."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster.real_town import WHOLE, RealTown
from tests.cluster.reference import load
from tests.cluster.ways import MIXTURE, check_colocated, check_ways
from tests.torch.families import FAMILIES, save_checkpoint

WHERE: tuple[dict[str, Any], ...] = (
    dict(prefills=0),
    dict(prefills=2, decodes=2, chunk=7),
    dict(transport="frames", chunk=7),
    dict(transport="pinned"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread would only wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_transformers_generates(family: str, tmp_path: Path) -> None:
    model = load(str(save_checkpoint(family, tmp_path / family)), block_size=4)
    lengths, length = (5, 1, 21, 2, 34), 12
    prompts = model.clear_prompts(lengths, length)
    eos = (model.generate(prompts[2], length).tokens[6],)
    expected = [model.generate(prompt, length, eos=eos).tokens for prompt in prompts]
    crowd = prompts * 3
    sampling = [replace(MIXTURE[i % 8], seed=i) for i in range(len(crowd))]
    drawn = []
    for where in WHERE:
        with RealTown(model, eos=eos, batch_size=16, blocks=256, **where) as town:
            assert town.ask(prompts, length) == expected
            if where.get("prefills") == 0:
                check_colocated(town)
            else:
                check_ways(town, prompts, where.get("chunk", WHOLE))
        with RealTown(model, eos=eos, batch_size=16, blocks=256, **where) as town:
            drawn.append(town.ask(crowd, length, sampling))
    assert all(each == drawn[0] for each in drawn[1:])
