"""The bytes of every message, frozen as long as the protocol has the same number.

Processes of two versions may meet, for example when workers are upgraded under a running router. Only the
protocol number tells them apart, so an encoding must not change while the number stays the same. Raise
PROTOCOL, then record the new encoding (see golden.py). Under the same number it cannot be recorded.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import count
from typing import Any, Union, get_args, get_origin, get_type_hints

# ---- the only imports of ours: the messages, their codec, and what travels inside of them as a mapping
from baton.params import GenerationParams
from baton.wire.codec import decode, encode
from baton.wire.messages import LOCAL, PROTOCOL, Message
from sampler.params import SamplingParams
from tests.pure.golden import UPDATING, check, differences, recorded

NAME = "wire.json"
KINDS = sorted({*get_args(Message)} - {*LOCAL}, key=lambda kind: kind.__name__)


SAMPLING = SamplingParams(
    temperature=0.5, logit_bias=((3, -1.5), (7, 100.0)), allowed_token_ids=(3, 7), seed=-1
)
VALID: dict[object, tuple[object, object]] = {  # their constructors check values: full, bare
    SamplingParams: (SAMPLING, SamplingParams()),
    GenerationParams: (
        GenerationParams(
            max_new_tokens=9,
            sampling=SAMPLING,
            stop=("a", "b"),
            stop_token_ids=(1, 2),
            ignore_eos=True,
            min_tokens=3,
            include_stop=True,
            keep_special=True,
            logprobs=4,
            prompt_logprobs=5,
            cache_salt="c",
            stream_interval_s=0.5,
        ),
        GenerationParams(1, SamplingParams()),  # a Start must name its sampling
    ),
}


def full(hint: Any, number: Iterator[int]) -> Any:
    """A value of this type with nothing left out; no two numbers in it are the same."""
    if hint in VALID:
        return VALID[hint][0]
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(*[full(hints[field.name], number) for field in fields(hint)])
    if hint is bool:
        return True
    if hint is int:
        return next(number)
    if hint is float:
        return next(number) + 0.5
    if hint is str:
        return f"s{next(number)}"
    if hint is bytes:
        return b"\x00b%d" % next(number)
    if get_origin(hint) is tuple:
        return tuple(full(get_args(hint)[0], number) for _ in range(2))
    if get_origin(hint) is Mapping:
        return {"text": "a", "int": 1, "real": 0.5, "bytes": b"\xff", "flag": True, "ints": [1, 2]}
    assert get_origin(hint) in (types.UnionType, Union), hint
    kind = next(arm for arm in get_args(hint) if arm is not type(None))
    return full(kind, number)


def bare(hint: Any, number: Iterator[int]) -> Any:
    """The same with nothing where there may be nothing."""
    if hint in VALID:
        return VALID[hint][1]
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(*[bare(hints[field.name], number) for field in fields(hint)])
    if get_origin(hint) is tuple:
        return ()
    if get_origin(hint) is Mapping:
        return {}
    if type(None) in get_args(hint):
        return None
    return False if hint is bool else full(hint, number)


def examples() -> dict[str, Any]:
    """Two of each message."""
    found = {}
    for kind in KINDS:
        found[kind.__name__] = full(kind, count(1))
        found[f"{kind.__name__}, bare"] = bare(kind, count(1))
    return found


def frozen() -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "messages": {name: encode(message).hex() for name, message in examples().items()},
    }


def test_no_encoding_changes_under_the_same_protocol_number() -> None:
    found, golden = frozen(), recorded(NAME)
    if UPDATING and golden is not None and golden["protocol"] == PROTOCOL:
        wrong = list(differences(golden, found, ""))
        assert not wrong, f"raise PROTOCOL first, it is still {PROTOCOL}:\n" + "\n".join(wrong)
    if not UPDATING and golden is not None and golden["protocol"] != PROTOCOL:
        raise AssertionError(
            f"PROTOCOL is {PROTOCOL}, and the encoding of {golden['protocol']} is recorded: run this "
            "test with BATON_UPDATE_GOLDENS=1"
        )
    check(NAME, found)


def test_recorded_bytes_are_still_understood() -> None:
    golden = recorded(NAME)["messages"]
    for name, message in examples().items():
        assert decode(bytes.fromhex(golden[name])) == message, name
