"""Regular expressions of a model's or an adapter's files: those that might hang the start are refused."""

import re

import pytest

from baton.adapters.config import read_spec
from baton.checkpoints.patterns import OddPattern, compiled
from baton.errors import ModelError
from baton.quantized.compressed import read_compressed
from baton.quantized.gptq import read_auto_round, read_gptq
from baton.quantized.scheme import Unread

PUBLISHED = (
    r".*\.(q|k|v|o)_proj",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj$",
    r"^(?!.*(vision|audio)).*layers\.(1[0-9]|2[0-3])\..*(self_attn|mlp)\..*_proj.*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|ffn).*?(?:q_proj|up_proj|fc1|fc2).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|up_proj)))",
    r"(?:layers\.|blocks\.)+x",
    r"(?i:Q_PROJ)",
    r"(?:[a-z]_){2}proj",
    r"(.*\.)?(lm_head)$",
)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_patterns_as_people_publish_them_are_read(pattern: str) -> None:
    assert compiled(pattern) == re.compile(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(?:a*)*b", "(a?){40}a", "((a{1,2}))+b", "(x(y(a+?)))*?b", "(?=(a+)+b).*",
        "(?:(a+)+b|c)",
        "(a|aa)*b", "(a|)+b", "([a-z]|[a-z_.0-9]x)*!", "(?i:(ab|AC)*)!", "(\\w|a_)*!",
        ".*.*.*.*.*!", "a?" * 30 + "a" * 30, "(?:a|aa)" * 30 + "!",
        "(?:a|aa){30}!", ".*a" * 7, "(?:.*.*(?:.*.*|b).*)!",
        "a" * 501, "(", "(?P<a>", "*",
    ],
)  # fmt: skip
def test_patterns_that_might_match_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(OddPattern):
        compiled(pattern)


HANGS = "(a+)+!"
MANY = {f".*{each}": 4 for each in range(1001)}
SCHEME = {"weights": {"num_bits": 4, "group_size": 32}}
READERS = {
    "compressed-tensors": lambda: read_compressed(
        {"config_groups": {"g": SCHEME | {"targets": [f"re:{HANGS}"]}}}
    ),
    "compressed-tensors, many": lambda: read_compressed(
        {"config_groups": {"g": SCHEME | {"targets": [f"re:{each}" for each in MANY]}}}
    ),
    "gptq": lambda: read_gptq({"bits": 4, "dynamic": {f"+:{HANGS}": {}}}),
    "gptq, many": lambda: read_gptq({"bits": 4, "dynamic": {each: {} for each in MANY}}),
    "auto-round": lambda: read_auto_round({"bits": 4, "extra_config": {HANGS: {}}}),
    "auto-round, many": lambda: read_auto_round(
        {"bits": 4, "extra_config": {each: {} for each in MANY}}
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_model_with_such_patterns_is_not_read(reader: str) -> None:
    with pytest.raises(Unread, match=r"repeat inside a repeat|1,001 regular expressions"):
        READERS[reader]()


@pytest.mark.parametrize(
    "field",
    [
        {"rank_pattern": {HANGS: 4}},
        {"alpha_pattern": {HANGS: 4}},
        {"target_modules": HANGS},
        {"exclude_modules": HANGS},
        {"layers_pattern": HANGS},
        {"layers_pattern": [HANGS]},
        {"rank_pattern": MANY},
        {"layers_pattern": [*MANY]},
    ],
)
def test_an_adapter_with_such_patterns_is_not_read(field: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"repeat inside a repeat|1,001 patterns"):
        read_spec("sql", {"peft_type": "LORA", "target_modules": ["q_proj"]} | field)


def test_modules_that_are_listed_one_by_one_are_no_patterns() -> None:
    names = [f"model.layers.{each}.mlp.up_proj" for each in range(2000)]
    settings = {"bits": 4, "extra_config": {each: {"bits": 8} for each in names}}
    assert len(read_auto_round(settings).rules) == len(names)
    config = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    assert read_spec("sql", config | {"rank_pattern": dict.fromkeys(names, 4)}).ranks
