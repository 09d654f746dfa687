"""Fields: what all requests have in common: nulls, fields without an effect here, unknown fields.

null       what a field has that is not given, wherever a field may be left out
known      fields of OpenAI, vLLM and others that change the answer, but not here: refused by name,
           unless their value is one that changes nothing
unknown    ignored, as are known fields that say who asks or how, and not what (docs/serving.md)
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from baton.server.api_error import ApiError

UNSUPPORTED = "unsupported"
Refusals = Mapping[str, tuple[Sequence[Any], str]]
"""By name: the values that change nothing, beside null and what is empty; what to do instead."""

LEAVE_OUT = "leave it out"
GENERATION: Refusals = {
    # OpenAI
    "audio": ((), LEAVE_OUT), "modalities": ((["text"],), "only text is generated"),
    "prediction": ((), LEAVE_OUT), "web_search_options": ((), LEAVE_OUT),
    "verbosity": (("medium",), LEAVE_OUT), "functions": ((), "use tools"),
    "function_call": (("none", "auto"), "use tools and tool_choice"),
    # vLLM
    "use_beam_search": ((False,), LEAVE_OUT), "length_penalty": ((1, 1.0), LEAVE_OUT),
    "early_stopping": ((False,), LEAVE_OUT), "bad_words": ((), "use logit_bias: -100 for token ids"),
    "prompt_logprobs": ((), "use /v1/completions with echo and logprobs"),
    "truncate_prompt_tokens": ((), "send a shorter prompt"),
    "spaces_between_special_tokens": ((True,), LEAVE_OUT), "detokenize": ((True,), LEAVE_OUT),
    "logits_processors": ((), LEAVE_OUT), "vllm_xargs": ((), LEAVE_OUT),
    "kv_transfer_params": ((), LEAVE_OUT), "prompt_embeds": ((), "use prompt"),
    "chat_template": ((), "start the server with --chat-template FILE"),
    "mm_processor_kwargs": ((), "only text is taken"), "media_io_kwargs": ((), "only text is taken"),
    "guided_whitespace_pattern": ((), LEAVE_OUT), "structural_tag": ((), LEAVE_OUT),
    "logprob_token_ids": ((), LEAVE_OUT), "thinking_token_budget": ((), "use max_tokens"),
    "repetition_detection": ((), LEAVE_OUT), "flat_logprobs": ((False,), LEAVE_OUT),
    # SGLang, llama.cpp, TGI
    "regex": ((), "use guided_regex"), "ebnf": ((), "use guided_grammar"),
    "json_schema": ((), "use guided_json"), "grammar": ((), "use guided_grammar"),
    "stop_regex": ((), "use stop"), "no_stop_trim": ((False,), "use include_stop_str_in_output"),
    "return_hidden_states": ((False,), LEAVE_OUT), "custom_logit_processor": ((), LEAVE_OUT),
    "input_ids": ((), "use prompt"), "lora_path": ((), LEAVE_OUT),
    "max_new_tokens": ((), "use max_tokens"), "n_predict": ((-1,), "use max_tokens"),
    "min_new_tokens": ((0,), "use min_tokens"), "repeat_penalty": ((1, 1.0), "use repetition_penalty"),
    "typical_p": ((1, 1.0), LEAVE_OUT), "mirostat": ((0,), LEAVE_OUT),
    "dry_multiplier": ((0, 0.0), LEAVE_OUT), "xtc_probability": ((0, 0.0), LEAVE_OUT),
    "num_beams": ((1,), LEAVE_OUT), "no_repeat_ngram_size": ((0,), LEAVE_OUT),
}  # fmt: skip
TOKENIZE: Refusals = {
    name: GENERATION[name] for name in ("chat_template", "mm_processor_kwargs", "media_io_kwargs")
}
STRUCTURED: Refusals = {
    "structural_tag": ((), LEAVE_OUT), "whitespace_pattern": ((), LEAVE_OUT),
    "disable_any_whitespace": ((False,), LEAVE_OUT),
}  # fmt: skip


def at_most(most: int, of: str) -> BeforeValidator:
    """For an object whose values are checked: its size first. pydantic looks at it last, after an error
    for each of too many values, and listing 300,000 errors holds up all other requests for a second. (Of
    a list it sees the size first, and fail_fast ends it at its first error.)"""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"must have at most {most:,} {of}, not {len(value):,}")
        return value

    return BeforeValidator(check)


def _nullable(schema: dict[str, Any]) -> None:
    """Describes the rule for nulls in a JSON schema."""
    required = schema.get("required", ())
    for name, each in schema.get("properties", {}).items():
        kinds = [each, *each.get("anyOf", ())]
        known = each.keys() & {"type", "anyOf", "oneOf", "$ref", "enum"}
        if name in required or not known or any(kind.get("type") == "null" for kind in kinds):
            continue
        about = {k: each[k] for k in ("title", "description", "default") if k in each}
        inner = {k: value for k, value in each.items() if k not in about}
        schema["properties"][name] = {"anyOf": [inner, {"type": "null"}]} | about


class Fields(BaseModel):
    """An object in a request. `unsupported`: what is refused in it; `within`: the request's field that it
    stands in, if it is not a request itself."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=_nullable)
    unsupported: ClassVar[Refusals] = {}
    within: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name in given.keys() & cls.unsupported.keys():
            harmless, instead = cls.unsupported[name]
            if not _is(given[name], (None, "", [], {}, *harmless)):
                place = f"{cls.within}.{name}" if cls.within else name
                text = f"{place} is not supported by this server: {instead}"
                raise ApiError.bad_request(text, cls.within or name, UNSUPPORTED)
        if not any(value is None for value in given.values()):
            return given
        optional = {
            field.alias or name
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }
        return {k: v for k, v in given.items() if v is not None or k not in optional}


def _is(value: Any, known: Sequence[Any]) -> bool:
    """Is it one of them? true is not 1 here."""
    return any(type(value) is type(each) and value == each for each in known)
