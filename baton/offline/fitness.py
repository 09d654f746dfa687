"""Fitness: do these prompts and lengths fit this model? Asked before anything is started."""

from collections.abc import Sequence

from baton.errors import InputError, RequestError
from baton.model_files import ModelFiles
from baton.params import GenerationParams, Limits, check_request
from baton.text import Tokenizer


def context_of(files: ModelFiles, max_model_len: int | None) -> int:
    """Tokens of prompt and generation together. InputError if the model has no room for the wish."""
    if max_model_len is None:
        return files.max_positions
    if max_model_len > files.max_positions:
        raise InputError(
            f"--max-model-len {max_model_len:,} is more than {files.name} has: its context is "
            f"{files.max_positions:,} tokens"
        )
    return max_model_len


def check_length(generation_length: int, *, context: int, model: str) -> None:
    """Even a prompt of one token must leave room for the generation."""
    if generation_length >= context:
        raise InputError(
            f"-l {generation_length:,} does not fit: the context of {model} is {context:,} tokens, "
            f"prompt included; use at most -l {context - 1:,}"
        )


def check_prompts_fit(
    prompts: Sequence[str], generation_length: int, *, files: ModelFiles, context: int
) -> None:
    """Every prompt is tokenized once for this. InputError names the first that does not fit."""
    tokenizer = Tokenizer(files.tokenizer_file)
    limits = Limits(context, files.vocab_size)
    params = GenerationParams(generation_length)
    for number, prompt in enumerate(prompts, 1):
        ids = tuple(tokenizer.encode(prompt))
        try:
            check_request(ids, params, limits)
        except RequestError as error:
            raise InputError(f"prompt {number} of {len(prompts)}: {error}") from error
