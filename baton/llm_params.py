"""Options of an LLM's calls, and its adapters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from baton import grammar
from baton.adapters.identity import Adapters
from baton.errors import InputError
from baton.params import GenerationParams
from sampler.params import SamplingParams

NEW_TOKENS = 128
SHOWN = 5
"""Adapters that a message names."""


class Options(TypedDict, total=False):
    """How prompts are continued, beside SamplingParams. At most one of json_schema, json_object
    and regex."""

    max_new_tokens: int  # 128 unless given
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int  # before these no stop string, stop token or EOS ends it
    include_stop: bool  # the stop string or token that ends it belongs to the text
    keep_special: bool  # special tokens have text too
    logprobs: int  # of each token, with so many alternatives (0 to 20)
    cache_salt: str  # cached KV is shared with requests of the same salt only
    json_schema: Mapping[str, Any]  # the text is JSON that fits this schema
    json_object: bool  # the text is a JSON object
    regex: str  # the text matches this pattern as a whole
    lora: (
        str | Sequence[str | None] | None
    )  # an adapter by its name; a list has one for each prompt


def params_of(sampling: SamplingParams, options: Options, interval_s: float) -> GenerationParams:
    """`options` as a request has them, without `lora`. Raises InputError."""
    if unknown := options.keys() - Options.__annotations__.keys():
        known = ", ".join(Options.__annotations__)
        raise InputError(f"there is no option {min(unknown)!r}; the options are {known}")
    given: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, **options}
    given.pop("lora", None)
    grammars = []
    if (schema := given.pop("json_schema", None)) is not None:
        grammars.append(grammar.json_schema(schema))
    if given.pop("json_object", False):
        grammars.append(grammar.json_object())
    if (pattern := given.pop("regex", None)) is not None:
        grammars.append(grammar.regex(pattern))
    if len(grammars) > 1:
        raise InputError("give at most one of json_schema, json_object and regex")
    stop = given.pop("stop", ())
    return GenerationParams(
        sampling=sampling,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(given.pop("stop_token_ids", ())),
        grammar="".join(grammars),
        stream_interval_s=interval_s,
        **given,
    )


def lora_options(lora: Mapping[str, str | Path] | None) -> tuple[str, ...]:
    """Names and folders of adapters as --lora has them. Raises InputError."""
    if lora is not None and not isinstance(lora, Mapping):
        raise InputError(
            f'lora must be a mapping of names to folders, {{"sql": "adapters/sql"}}, got '
            f"{type(lora).__name__}"
        )
    for name, folder in (lora or {}).items():
        if not isinstance(name, str) or "=" in name or not isinstance(folder, str | Path):
            raise InputError(
                f"lora must be names without = and their folders, got {name!r:.80}: {folder!r:.80}"
            )
    return tuple(f"{name}={folder}" for name, folder in (lora or {}).items())


def chosen(lora: str | Sequence[str | None] | None, prompts: int, adapters: Adapters) -> list[str]:
    """The digest of each prompt's adapter; empty: the model itself. InputError for a name that is not
    there, and for a list of another length."""
    names = [lora] * prompts if lora is None or isinstance(lora, str) else list(lora)
    if len(names) != prompts:
        raise InputError(
            f"lora names {len(names)} adapters for {prompts} prompts: give one name, or one for each"
        )
    known = {each.name: each.digest for each in adapters}
    for name in names:
        if name is not None and name not in known:
            more = f" and {len(known) - SHOWN:,} more" if len(known) > SHOWN else ""
            here = ", ".join(list(known)[:SHOWN]) + more if known else "none"
            raise InputError(f"there is no adapter {name!r:.80} here; there are: {here}")
    return ["" if name is None else known[name] for name in names]
