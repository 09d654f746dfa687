"""What a request of a real town must have gone through, and kinds of sampling to send it with."""

from sampler.params import SamplingParams
from tests.cluster.real_town import WHOLE, RealTown

MIXTURE = (
    SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=1.2, top_p=0.8, repetition_penalty=1.3),
    SamplingParams(temperature=1.5, min_p=0.05),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.4),
    SamplingParams(temperature=0.9, top_k=8, top_p=0.9, min_p=0.02, repetition_penalty=0.9),
)


def check_ways(town: RealTown, prompts: list[list[int]], chunk: int) -> None:
    """Every worker had its part, and the KV bytes went the way they should: none where memory is
    shared, else those of all blocks touched, once for each chunk that touched them."""
    layout = town.model.engine.layout
    for i, prompt in enumerate(prompts):
        way, timings = town.ways[f"q{i}"], town.finished[f"q{i}"].timings
        fill = len(prompt) - 1
        assert timings.kv_bytes * layout.block_size == fill * layout.block_bytes
        assert timings.retries == 0
        if not fill:
            assert way.receipt is None
            continue
        assert way.receipt is not None
        assert way.receipt.transport == town.transport
        assert timings.moved_bytes == way.receipt.moved_bytes
        whole = layout.blocks_for(fill) * layout.block_bytes
        if town.transport == "shm":
            assert way.receipt.moved_bytes == 0
        elif chunk == WHOLE:
            assert way.receipt.moved_bytes == whole
        elif chunk == 1:
            assert way.receipt.moved_bytes == fill * layout.block_bytes
        else:
            assert whole <= way.receipt.moved_bytes < fill * layout.block_bytes or fill == 1
    at_work = {way.filled_by for way in town.ways.values() if way.filled_by}
    at_work |= {way.decoded_by for way in town.ways.values()}
    assert at_work == {name.partition(".")[0] for name in town.workers()}


def check_colocated(town: RealTown) -> None:
    assert {way.filled_by for way in town.ways.values()} == {""}
    assert {way.decoded_by for way in town.ways.values()} == {
        name.partition(".")[0] for name in town.workers()
    }
    assert {end.timings.moved_bytes for end in town.finished.values()} == {0}
