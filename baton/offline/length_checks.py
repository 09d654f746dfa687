"""Length checks: do the prompts and the new tokens fit into the model's context? Before any start."""

from collections.abc import Sequence

from baton.errors import InputError, RequestError
from baton.model_files import ModelFiles, resolve_model
from baton.offline.settings import OwnCluster
from baton.params import GenerationParams, Limits, check_request
from baton.text import Tokenizer, encode_prompt


def checked_model(
    target: OwnCluster, prompts: Sequence[str], generation_length: int
) -> tuple[ModelFiles, int]:
    """The model's files, and its context: tokens of prompt and answer together. InputError names the
    first prompt that does not fit; raises ModelError."""
    files = resolve_model(target.options.model, download=target.download)
    context = target.options.max_model_len or files.max_positions
    if context > files.max_positions:
        raise InputError(
            f"--max-model-len {context:,} is more than {files.name} has: its context is "
            f"{files.max_positions:,} tokens"
        )
    check_length(generation_length, context=context, model=files.name)
    tokenizer = Tokenizer(files.tokenizer_file)
    limits = Limits(context, files.vocab_size)
    params = GenerationParams(generation_length)
    for number, prompt in enumerate(prompts, 1):
        try:
            check_request(encode_prompt(tokenizer, prompt, context), params, limits)
        except RequestError as error:
            raise InputError(f"prompt {number} of {len(prompts)}: {error}") from error
    return files, context


def check_length(generation_length: int, *, context: int, model: str) -> None:
    """Raise InputError if the context is too short even for a prompt of one token."""
    if generation_length >= context:
        raise InputError(
            f"-l {generation_length:,} does not fit: the context of {model} is {context:,} tokens, "
            f"prompt included; use at most -l {context - 1:,}"
        )
