"""Evaluation in process on a GPU: the numbers of the CPU."""

import pytest
import torch

from baton.model_files import resolve_model
from baton.text import Tokenizer
from tools.evaluation import data
from tools.evaluation.engine import EngineSubject
from tools.evaluation.perplexity import score_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_a_gpu_foresees_and_writes_as_the_cpu_does() -> None:
    files = resolve_model(data.BUNDLED_MODEL)
    tokenizer = Tokenizer(files.tokenizer_file)
    cpu, gpu = (
        EngineSubject(files, device=device, dtype="float32", threads=None)
        for device in ("cpu", "cuda:0")
    )
    texts = data.held_out_texts()[:20]
    one, other = (score_texts(each, tokenizer, texts, window=64, stride=20) for each in (cpu, gpu))
    assert one.bits == pytest.approx(other.bits, rel=1e-3)
    prompts = [tuple(tokenizer.encode(pair.prompt)) for pair in data.held_out_pairs()[:4]]
    same = [
        a.text == b.text
        for a, b in zip(cpu.write(prompts, 20), gpu.write(prompts, 20), strict=True)
    ]
    assert sum(same) >= 3  # a near tie may fall the other way
