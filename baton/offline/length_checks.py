"""Length checks: do the prompts and the new tokens fit into the model's context? Before any start."""

from collections.abc import Sequence

from baton.errors import InputError, RequestError
from baton.model_files import ModelFiles
from baton.params import GenerationParams, Limits, check_request
from baton.text import Tokenizer


def context_of(files: ModelFiles, max_model_len: int | None) -> int:
    """Tokens of prompt and answer together. InputError if the model has fewer than `max_model_len`."""
    if max_model_len is None:
        return files.max_positions
    if max_model_len > files.max_positions:
        raise InputError(
            f"--max-model-len {max_model_len:,} is more than {files.name} has: its context is "
            f"{files.max_positions:,} tokens"
        )
    return max_model_len


def check_length(generation_length: int, *, context: int, model: str) -> None:
    """InputError if not even a prompt of one token leaves enough context."""
    if generation_length >= context:
        raise InputError(
            f"-l {generation_length:,} does not fit: the context of {model} is {context:,} tokens, "
            f"prompt included; use at most -l {context - 1:,}"
        )


def check_prompts_fit(
    prompts: Sequence[str], generation_length: int, *, files: ModelFiles, context: int
) -> None:
    """Tokenizes every prompt. InputError names the first that does not fit."""
    tokenizer = Tokenizer(files.tokenizer_file)
    limits = Limits(context, files.vocab_size)
    params = GenerationParams(generation_length)
    for number, prompt in enumerate(prompts, 1):
        ids = tuple(tokenizer.encode(prompt))
        try:
            check_request(ids, params, limits)
        except RequestError as error:
            raise InputError(f"prompt {number} of {len(prompts)}: {error}") from error
