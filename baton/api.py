"""generate(): one prompt, one call, one string. `from baton import generate`.

    >>> generate("demo", "In the future, artificial intelligence will", 40)

Every call loads the model into this process and frees it again. For more than one call keep an
LLM (baton/llm.py); for many prompts from the command line, `python main.py`.
"""

from collections.abc import Sequence

from baton.errors import InputError
from baton.llm import LLM
from sampler.params import SamplingParams


def generate(
    model_name: str,
    prompt: str,
    max_new_tokens: int,
    device: str = "auto",
    *,
    sampling: SamplingParams | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    dtype: str = "auto",
    colocated: bool = False,
    download: bool = False,
) -> str:
    """The continuation of `prompt`, without the prompt, at most `max_new_tokens` long.

    `model_name` is a name of configs/model_paths.yaml, a folder, or a Hugging Face id. `device` is
    where the model runs: auto, cpu, cuda:0, ... `colocated`: the decode worker fills its own KV.
    `sampling` None is the model's own default with seed 0. Raises InputError for what was passed,
    ModelError for the model, and the other errors of baton.errors for what fails on the way.
    """
    if not prompt:
        raise InputError("the prompt is empty; it needs at least one character")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    with LLM(
        model_name,
        device=device,
        dtype=dtype,
        colocated=colocated,
        download=download,
        max_num_seqs=1,
    ) as llm:
        return llm.generate(
            prompt, sampling, max_new_tokens=max_new_tokens, stop=stop, ignore_eos=ignore_eos
        ).text
