"""Guided answers: whatever the model would like to say, what comes out is of the grammar."""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from baton import grammar
from baton.errors import ModelError, RequestError
from baton.grammar import Grammars, GrammarSpec, Matcher, json_object, json_schema, regex
from baton.text import Tokenizer

FILE = Path(__file__).resolve().parents[2] / "baton" / "models" / "demo" / "tokenizer.json"
VOCABULARY = 2048
END = 0

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "été"]}, "maxItems": 3},
    },
    "required": ["name", "age", "zip"],
    "additionalProperties": False,
}
PATTERNS = [
    r"[a-z]{2,5}",
    r"(yes|no|perhaps)!?",
    r"-?[0-9]{1,3}(\.[0-9]+)?",
    r"(x+x+)+y",
    r"a/b\\/\nc",
    r"[àéœ漢🙂]{1,6}\.",
    r"(The|A) (cat|dog) (sat|ran)\.( It (sat|ran)\.){0,3}",
]


def is_person(text: str) -> bool:
    """The schema again, by hand."""
    match loaded(text):
        case {"name": str(name), "age": int(age), "zip": str(code), **rest}:
            tags: Any = rest.pop("tags", [])
            known = isinstance(tags, list) and {*tags} <= {"red", "green", "été"} and not rest
            sizes = known and 1 <= len(name) <= 20 and 0 <= age <= 150 and len(tags) <= 3
            return sizes and re.fullmatch("[0-9]{5}", code) is not None
    return False


def loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


Case = tuple[str, Callable[[str], bool]]
CASES: list[Case] = [
    (json_object(), lambda text: isinstance(loaded(text), dict)),
    (json_schema(PERSON), is_person),
    *((regex(p), lambda text, p=p: re.fullmatch(p, text) is not None) for p in PATTERNS),
]


class Model:
    """A vocabulary, and what its ids say."""

    def __init__(self, file: Path, vocabulary: int, ends: tuple[int, ...]) -> None:
        self.grammars = Grammars(file, vocabulary, ends)
        self.text = Tokenizer(file)
        self.vocabulary = vocabulary
        self.ends = ends
        # the shortest way out of a JSON text or a short regex; the others are as they come
        way = {each: rank for rank, each in enumerate('"}]:y.!0')}
        self.last = sorted(
            range(vocabulary),
            key=lambda i: (i not in ends, way.get(self.text.decode([i]), len(way))),
        )

    def allowed(self, guide: Matcher) -> list[int]:
        mask = guide.mask()
        assert len(mask) == 4 * -(-self.vocabulary // 32)
        bits = int.from_bytes(mask, "little")
        assert bits < 1 << self.vocabulary
        return [i for i in range(self.vocabulary) if bits >> i & 1]

    def walk(self, guide: Matcher, choices: list[int], longest: int = 200) -> list[int]:
        """Ids that the guide allows: as the choices say, and then straight to an end."""
        ids: list[int] = []
        while not guide.finished and len(ids) < longest:
            may = self.allowed(guide)
            if len(ids) < len(choices):
                ids.append(may[choices[len(ids)] % len(may)])
            else:
                ids.append(next(each for each in self.last if each in set(may)))
            assert guide.accept(ids[-1])
        return ids


@cache
def demo() -> Model:
    return Model(FILE, VOCABULARY, (END,))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """As SentencePiece makes them: ▁ for a space, bytes as tokens of their own, two ends, the second
    an ordinary word as the tokenizer sees it; and more logits than the tokenizer has ids."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "</s>", "▁", "▁{", '"', '":', "{", "}",
             "a", "e", "The", "▁cat", "▁sat", "é", "漢", "<", "s", ">", "/", "END"]  # fmt: skip
    bpe = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True)
    tokenizer = FastTokenizer(bpe)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    file = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    tokenizer.save(str(file))
    return Model(file, len(words) + 25, (words.index("END"), words.index("</s>")))


CHOICES = st.lists(st.integers(0, 2**16), max_size=40)


def check_walk(model: Model, case: Case, choices: list[int]) -> None:
    """Ends stand exactly where the text is whole; and anyone could have gone on from anywhere."""
    spec, fits = case
    ids = model.walk(model.grammars.open(spec), choices)
    guide = model.grammars.open(spec)
    for index, each in enumerate(ids):
        may = model.allowed(guide)
        ends = {*may} & {*model.ends}
        text = model.text.decode(ids[:index])
        assert ends == ({*model.ends} if fits(text) else set()), text
        if index % 7 == 0:
            other = model.grammars.open(spec, ids[:index])
            assert model.allowed(other) == may
            assert other.finished == guide.finished
        assert each in may
        assert guide.accept(each)
    assert guide.finished, "the walk leads to an end"
    assert set(model.allowed(guide)) == {*model.ends}
    assert fits(model.text.decode([each for each in ids if each not in model.ends]))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(CASES), CHOICES)
def test_what_ends_is_of_the_grammar_and_can_go_on_anywhere(case: Case, choices: list[int]) -> None:
    check_walk(demo(), case, choices)


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(CASES), choices=CHOICES)
def test_a_tokenizer_of_the_other_kind_does_the_same(
    fallback: Model, case: Case, choices: list[int]
) -> None:
    check_walk(fallback, case, choices)


@pytest.mark.parametrize("spec", [spec for spec, _ in CASES])
def test_what_is_not_allowed_is_refused_and_changes_nothing(spec: str) -> None:
    model = demo()
    guide = model.grammars.open(spec)
    for _ in range(6):
        may = model.allowed(guide)
        outside = [-1, -(10**12), VOCABULARY, VOCABULARY + 1, 2**32, 2**64, 10**30]
        assert not any(guide.accept(each) for each in outside)
        for each in {*range(0, VOCABULARY, 37)} - {*may}:
            other = model.grammars.open(spec) if each == END else None
            assert other is None or not other.accept(each)
        assert model.allowed(guide) == may
        guide.accept(may[len(may) // 2])


def test_every_allowed_id_is_accepted_and_no_other_text() -> None:
    model = demo()
    spec = regex("[a-e]{3}[0-9]")
    may = model.allowed(model.grammars.open(spec))
    for each in range(VOCABULARY):
        text = model.text.decode([each])
        fits = each != END and re.fullmatch("[a-e]{1,3}|[a-e]{3}[0-9]", text) is not None
        assert (each in may) == fits, text
        assert model.grammars.open(spec).accept(each) == fits


def test_after_an_end_only_ends_come() -> None:
    guide = demo().grammars.open(regex("[0-9]+"))
    assert not guide.accept(END)
    five = demo().text.encode("5")[0]
    assert guide.accept(five)
    assert not guide.finished
    assert guide.accept(END)
    assert guide.finished
    assert demo().allowed(guide) == [END]
    assert not guide.accept(five)
    assert guide.accept(END)
    assert demo().grammars.open(regex("[0-9]+"), [five, END]).finished


def test_ids_that_do_not_fit_are_no_beginning_of_an_answer() -> None:
    with pytest.raises(RequestError, match=r"number 1 of the answer") as caught:
        demo().grammars.open(regex("ab"), [*demo().text.encode("a"), END])
    assert caught.value.code == "grammar_failed"


@pytest.mark.parametrize("ends", [(), (VOCABULARY + 900,), (5000,), (7, VOCABULARY + 900)])
def test_ends_that_the_tokenizer_does_not_know(ends: tuple[int, ...]) -> None:
    model = Model(FILE, VOCABULARY + 1000, ends)
    guide = model.grammars.open(regex("a|ab"))
    known = [each for each in ends if each < VOCABULARY + 1000]
    assert not {*model.allowed(guide)} & {*ends}
    assert not any(guide.accept(each) for each in (VOCABULARY, VOCABULARY + 1, VOCABULARY + 900))
    assert guide.accept(model.text.encode("a")[0])
    assert {*known} <= {*model.allowed(guide)} <= {*known, model.text.encode("b")[0]}
    assert guide.accept(model.text.encode("b")[0])
    assert guide.finished
    assert model.allowed(guide) == known


def test_a_model_with_fewer_logits_than_its_tokenizer_has_ids() -> None:
    model = Model(FILE, 1001, (END,))
    guide = model.grammars.open(regex("(?s:.)*"))
    assert max(model.allowed(guide)) == 1000
    assert not guide.accept(1001)


def test_special_tokens_are_no_text(fallback: Model) -> None:
    for model, special in ((demo(), END), (fallback, 256)):
        grammars = Grammars(model.grammars._tokenizer_file, model.vocabulary, (300,))
        guide = grammars.open(regex("(?s:.)*"))
        assert special not in model.allowed(guide)
        assert not guide.accept(special)


def test_white_space_between_the_parts_comes_to_an_end() -> None:
    model = demo()
    guide = model.grammars.open(json_schema({"type": "array", "items": {"type": "integer"}}))
    assert guide.accept(model.text.encode("[")[0])
    blanks = {i for i in range(VOCABULARY) if i != END and not model.text.decode([i]).strip()}
    steps = 0
    while may := {*model.allowed(guide)} & blanks:
        assert guide.accept(min(may))
        steps += 1
    assert 0 < steps <= grammar.INDENT + 1


@pytest.mark.parametrize("gap", ["", " ", "\n  ", "\n\t\t", "\n" + " " * grammar.INDENT])
def test_usual_layouts_of_json_are_allowed(gap: str) -> None:
    text = f'{{{gap}"a":{gap}[{gap}1,{gap}2{gap}],{gap}"b":{gap}"x  y"{gap}}}'
    guide = demo().grammars.open(json_object())
    assert all(guide.accept(each) for each in demo().text.encode(text)), text
    assert guide.finished


def test_a_grammar_that_turns_out_too_complex_ends_its_own_answer_only() -> None:
    model = demo()
    guide = model.grammars.open(regex("a?" * 2000))
    for _ in range(2):
        with pytest.raises(RequestError, match="cannot go on by its grammar") as caught:
            model.walk(guide, [3] * 30)
        assert caught.value.code == "grammar_failed"
        assert not guide.finished
        assert not guide.accept(END)
    assert model.walk(model.grammars.open(regex("ab")), [])


def test_the_order_of_properties_is_the_schemas() -> None:
    schema = {"type": "object", "required": ["b", "a"], "additionalProperties": False,
              "properties": {"b": {"const": 1}, "a": {"const": 2}}}  # fmt: skip
    grammars = demo().grammars
    assert grammars.open(json_schema(schema), demo().text.encode('{"b":1,"a":2}')).finished
    with pytest.raises(RequestError):
        grammars.open(json_schema(schema), demo().text.encode('{"a":2,"b":1}'))


def test_a_schema_cannot_change_the_settings() -> None:
    loose = {"x-guidance": {"whitespace_pattern": " +", "lenient": True}, "type": "object"}
    assert GrammarSpec.parse(json_schema(loose)) == GrammarSpec.parse(json_object())


# ---- what is refused, and what hostile input costs


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def on_the_wire(schema: str) -> str:
    return f'{{"kind":"json_schema","schema":{schema}}}'


DEEP = '{"items":' * 10_000 + "{}" + "}" * 10_000
LONG = json.dumps({"enum": [f"value {i}" for i in range(70_000)]})
EXPONENTIAL = {"allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(10, 40)]}
QUARTIC: dict[str, Any] = {"patternProperties": {f"^p{i}x+$": {} for i in range(500)}}
PRODUCT = [
    {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]}
    for i in range(6)
]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "not JSON"),
        ("nonsense", "not JSON"),
        ("[" * 60_000, "not JSON"),
        ('{"kind":"json_object"}\ud800', "not JSON"),
        ("[]", "a grammar is"),
        ('{"kind":"lark","grammar":"start: A"}', "a grammar is"),
        ('{"kind":"regex","pattern":"a","more":1}', "a grammar is"),
        ('{"kind":"regex","pattern":3}', "a grammar is"),
        (on_the_wire("true"), "a grammar is"),
        (on_the_wire('{"type":"strnig"}'), "Invalid type: strnig"),
        (on_the_wire('{"type":"number","minimum":1e999}'), "cannot be compiled"),
        (on_the_wire('{"not":{"type":"null"}}'), "keyword not cannot be enforced"),
        (on_the_wire('{"items":{"uniqueItems":true}}'), "keyword uniqueItems at /items cannot"),
        (on_the_wire('{"$ref":"#/$defs/none"}'), "does not exist"),
        (on_the_wire('{"$ref":"file:///etc/passwd"}'), "does not fetch"),
        (on_the_wire('{"$ref":"#"}'), "no text fits"),
        (on_the_wire('{"enum":[]}'), "Unsatisfiable"),
        (on_the_wire(DEEP), "65536 are the limit"),
        (on_the_wire(DEEP[:36_000]), "not JSON"),
        (on_the_wire(json.dumps(nested(40))), "nested deeper than 32"),
        (on_the_wire(LONG), "65536 are the limit"),
        (on_the_wire(json.dumps({"const": "x" * 5000})), "4096 are the limit"),
        (on_the_wire(json.dumps(EXPONENTIAL)), "30 patterns and formats"),
        (on_the_wire(json.dumps(QUARTIC)), "500 patternProperties"),
        (on_the_wire(json.dumps({"allOf": PRODUCT})), "too complex|too large"),
        ('{"kind":"regex","pattern":"(?=a)b"}', "look-around"),
        (r'{"kind":"regex","pattern":"(a)\\1"}', "backreferences"),
        ('{"kind":"regex","pattern":"(a"}', "unclosed group"),
        (r'{"kind":"regex","pattern":"a\\"}', "backslash"),
        ('{"kind":"regex","pattern":"' + "(" * 4000 + '"}', "cannot be compiled"),
        ('{"kind":"regex","pattern":"a{1000000000}"}', "cannot|too complex"),
        ('{"kind":"regex","pattern":"' + "a?" * 20_000 + '"}', "4096 are the limit"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_the_unfit_is_refused_in_one_short_line(spec: str, reason: str) -> None:
    before = time.process_time()
    with pytest.raises(RequestError, match=reason) as caught:
        demo().grammars.check(spec)
    assert time.process_time() - before < 5
    assert caught.value.code == "invalid_grammar"
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        regex("(a{1,1000}){1,1000}"),
        regex("(x+x+)+y"),
        regex("(a|b)*a(a|b){200}"),
        regex("(a?){100000}b"),
        regex("(" * 100 + "a" + ")*" * 100),
        regex("[a-z]?" * 100),
        json_schema({"enum": [str(i) for i in range(8000)]}),
        json_schema({"const": "x" * 4096}),
        json_schema({"type": "string", "pattern": "^(a{1,1000}){1,1000}$", "description": "bomb"}),
        json_schema({"type": "string", "maxLength": 10**9}),
        json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
        json_schema({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        json_schema(nested(29)),
    ],
    ids=lambda spec: spec[:60],
)
def test_the_demanding_is_served_in_time(spec: str) -> None:
    before = time.process_time()
    demo().grammars.check(spec)
    model = demo()
    assert model.walk(model.grammars.open(spec), [3] * 30, longest=30)
    assert time.process_time() - before < 5


@pytest.mark.parametrize("schema", [{"a": {1, 2}}, {"a": float("nan")}, {"minimum": float("inf")}])
def test_what_is_no_json_is_no_schema(schema: Mapping[str, Any]) -> None:
    with pytest.raises(RequestError, match="not JSON"):
        json_schema(schema)


def test_a_schema_that_holds_itself() -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    with pytest.raises(RequestError, match="not JSON"):
        json_schema(schema)


@pytest.mark.parametrize(
    "beside", ["{}", '{"eos_token": "<more>", "extra_special_tokens": ["<x>"]}']
)
def test_a_tokenizer_may_be_gone_before_the_first_request(tmp_path: Path, beside: str) -> None:
    """A long-running service has not used its folder in the cache for days."""
    folder = tmp_path / "kept"
    folder.mkdir()
    shutil.copy(FILE, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(beside)
    grammars = Grammars(folder / "tokenizer.json", VOCABULARY, (END,))
    shutil.rmtree(folder)
    grammars.check(json_object())
    assert not grammars.open(regex("a+"), stop_token_ids=(END,)).finished


def test_a_tokenizer_that_is_missing_or_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.json is broken"):
        Grammars(tmp_path / "none.json", 10, (0,)).check(json_object())
    file = tmp_path / "tokenizer.json"
    FastTokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(file))
    with pytest.raises(RequestError, match="no grammar can guide") as caught:
        Grammars(file, 10, (0,)).check(json_object())
    assert caught.value.code == "invalid_grammar"
