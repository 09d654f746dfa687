"""With recorded steps too: disaggregated = colocated = transformers.generate, through prefix hits,
preemption and guesses, over pools whose last block is granted to nobody."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from baton.engine.cuda.graphs import Again, GraphRunner, StaticAttention
from baton.engine.loading import load_model
from baton.engine.selftest import in_torch
from baton.kv.region import Region
from decode_worker.draft import DraftModel
from decode_worker.speculation import Speculation
from decode_worker.worker import DecodeWorker
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.real_town import RealTown
from tests.cluster.reference import Model
from tests.cluster.ways import MIXTURE

CPU = torch.device("cpu")
LENGTH = 20


class SpareTown(RealTown):
    """Its pools have one block more than their tables know."""

    def _open_pool(self, name: str) -> tuple[Region, ...]:
        self._blocks += 1
        try:
            return super()._open_pool(name)
        finally:
            self._blocks -= 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode_worker.decoding.spare_blocks", lambda device: 1)


@pytest.fixture(scope="module")
def demo() -> Model:
    """Its engine records."""
    model = calm.demo()
    runner, layout = in_torch(load_model(model.files, CPU, torch.float32), torch.float32, 16)
    graphs = GraphRunner(runner, StaticAttention(), Again)
    return replace(model, engine=replace(model.engine, runner=graphs, layout=layout))


@pytest.mark.parametrize("way", ["shm", "pinned", "colocated"])
def test_recorded_steps_say_what_transformers_generates(demo: Model, way: str) -> None:
    prompts = demo.clear_prompts((5, 1, 17, 2, 34, 16), LENGTH)
    expected = [demo.generate(prompt, LENGTH).tokens for prompt in prompts]
    before = demo.engine.runner.replayed
    transport, prefills = ("shm", 0) if way == "colocated" else (way, 1)
    with SpareTown(demo, prefills=prefills, transport=transport) as town:
        assert town.ask(prompts, LENGTH) == expected
    assert demo.engine.runner.replayed - before >= LENGTH - 5


def test_giving_way_in_a_full_pool_changes_no_answer(demo: Model) -> None:
    prompts = demo.clear_prompts([5, 17, 2, 34, 16, 9, 21, 3], 50)
    with SpareTown(demo) as town:
        roomy = town.ask(prompts, 50, list(MIXTURE))
    with SpareTown(demo, blocks=8) as town:
        assert town.ask(prompts, 50, list(MIXTURE), clean=False) == roomy
        assert any(end.timings.preemptions for end in town.finished.values())


def test_guesses_of_a_draft_that_records_are_right(demo: Model) -> None:
    prompts = demo.clear_prompts([5, 17, 2], LENGTH)
    sampling = [SamplingParams(temperature=0)] * len(prompts)
    expected = [demo.generate(prompt, LENGTH).tokens for prompt in prompts]
    engine = demo.engine
    graphs = GraphRunner(engine.runner.plain, StaticAttention(), Again)
    with SpareTown(demo) as town:
        for node in town.nodes.values():
            if isinstance(node, DecodeWorker):
                draft = DraftModel(replace(engine, runner=graphs), 64, context=200, chunk=16)
                node.speculation = Speculation(draft, most=4)
        assert town.ask(prompts, LENGTH, sampling) == expected
    assert graphs.replayed > LENGTH // 2
