"""SamplingParams: how the tokens of one choice of a request are drawn. This module needs no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Below this temperature, logits / temperature is a one-hot in float32 anyway (vLLM's limit too).
GREEDY_BELOW = 1e-5

MOST_BIASES = 1024
MOST_ALLOWED = 1024

# name: (type, the rule in words, the rule). NaN fails every comparison, so every rule rejects it.
# A penalty outside 1e-30 .. 1e30 would turn ordinary logits into infinities in float32.
RULES: dict[str, tuple[type[int] | type[float], str, Callable[[float], bool]]] = {
    "temperature": (float, "in [0, 2]", lambda x: 0 <= x <= 2),
    "top_k": (int, "-1 or 0 (off), or in [1, 2**31)", lambda x: -1 <= x < 2**31),
    "top_p": (float, "in (0, 1]", lambda x: 0 < x <= 1),
    "min_p": (float, "in [0, 1]", lambda x: 0 <= x <= 1),
    "repetition_penalty": (float, "finite and > 0 (1e-30 to 1e30)", lambda x: 1e-30 <= x <= 1e30),
    "presence_penalty": (float, "in [-2, 2]", lambda x: -2 <= x <= 2),
    "frequency_penalty": (float, "in [-2, 2]", lambda x: -2 <= x <= 2),
    "seed": (int, "in [-2**63, 2**63)", lambda x: -(2**63) <= x < 2**63),
    "choice": (int, "in [0, 2**31)", lambda x: 0 <= x < 2**31),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """A new number is one line here and one in RULES; a new filter also needs an entry in filters.py.
    ValueError states the rule and the value."""

    temperature: float = 1.0  # below 1e-5: greedy
    top_k: int = 0  # 0: off; -1 is accepted and stored as 0
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off; counts prompt and generated tokens, as transformers
    presence_penalty: float = 0.0  # subtracted once for each generated token id, as OpenAI
    frequency_penalty: float = 0.0  # subtracted for each occurrence of a generated token id
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, amount added to its logit)
    allowed_token_ids: tuple[int, ...] | None = None  # None: all
    seed: int = 0
    choice: int = 0  # index among the request's n answers; each draws its own numbers

    def __post_init__(self) -> None:
        for name, (kind, rule, holds) in RULES.items():
            value = getattr(self, name)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name} must be {_NOUNS[kind]}, got {_shown(value)}")
            if not holds(value):
                raise ValueError(f"{name} must be {rule}, got {_shown(value)}")
            object.__setattr__(self, name, kind(value))  # 1 and 1.0 are the same on the wire
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _checked_allowed(self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def plain(self) -> bool:
        """Whether the token is the argmax of the raw logits, whatever the earlier tokens."""
        shaped = self.presence_penalty or self.frequency_penalty or self.logit_bias
        free = self.allowed_token_ids is None
        return self.greedy and self.repetition_penalty == 1.0 and free and not shaped

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingParams":
        """The parameters of `transformers.generate` with this generation_config.json.

        Absent and null fields take transformers' own defaults
        (`GenerationConfig._get_default_generation_params`, 5.23): do_sample false, which is greedy
        whatever the other fields say, and **top_k 50** when sampling, unlike ours (off). The
        repetition penalty applies to greedy rows too. Unsupported steps (typical_p,
        no_repeat_ngram_size, num_beams, ...) are ignored here; the caller that reads the file warns.
        """
        given = {name: value for name, value in config.items() if value is not None}
        if type(do_sample := given.get("do_sample", False)) is not bool:
            raise ValueError(f"do_sample must be true or false, got {_shown(do_sample)}")
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        chosen = {"top_k": 50} | {name: given[name] for name in names if name in given}
        if not do_sample:
            penalty = given.get("repetition_penalty", 1.0)
            return cls(temperature=0.0, repetition_penalty=penalty)
        return cls(**chosen)


def _checked_bias(pairs: object) -> tuple[tuple[int, float], ...]:
    """The pairs as tuples. Ids past the vocabulary, which is unknown here, have no effect."""
    rule = "logit_bias must be"
    kinds = (list, tuple)
    if not isinstance(pairs, kinds):
        raise ValueError(f"{rule} pairs of a token id and a bias, got {_shown(pairs)}")
    if len(pairs) > MOST_BIASES:
        raise ValueError(f"{rule} at most {MOST_BIASES:,} pairs, got {len(pairs):,}")
    checked: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, kinds) or len(pair) != 2:
            raise ValueError(f"{rule} pairs of a token id and a bias, got {_shown(pair)}")
        token, bias = pair
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"{rule} for token ids in [0, 2**31), got {_shown(token)}")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(
                f"{rule} numbers in [-100, 100], got {_shown(bias)} for token id {token}"
            )
        if token in checked:
            raise ValueError(f"{rule} one number for a token id, got two for {token}")
        checked[token] = float(bias)
    return tuple(checked.items())


def _checked_allowed(ids: object) -> tuple[int, ...]:
    """The ids sorted, without repeats. Ids past the vocabulary have no effect."""
    rule = "allowed_token_ids must be"
    if not isinstance(ids, (list, tuple)) or not 1 <= len(ids) <= MOST_ALLOWED:
        raise ValueError(f"{rule} 1 to {MOST_ALLOWED:,} token ids, got {_shown(ids)}")
    for token in ids:
        if type(token) is not int or not 0 <= token < 2**31:
            raise ValueError(f"{rule} token ids in [0, 2**31), got {_shown(token)}")
    return tuple(sorted(set(ids)))


_NOUNS = {int: "an integer", float: "a number"}


def _shown(value: object) -> str:
    """The value, shortened for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
