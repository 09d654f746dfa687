"""What a client may ask for beyond tokens: logprobs, the prompt's too; grammars; when to stop."""

import json
import re
from collections.abc import Iterator

import pytest
import torch

from baton.grammar import json_schema, regex
from baton.wire import messages as msg
from sampler.params import SamplingParams
from tests.cluster import calm
from tests.cluster.real_town import WHOLE, RealTown
from tests.cluster.reference import Model

GREEDY = SamplingParams(temperature=0.0)
WARM = SamplingParams(temperature=0.9, seed=3)
CLOSE = 2e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def demo() -> Model:
    return calm.demo()


def expected(demo: Model, ids: list[int]) -> torch.Tensor:
    """log-probabilities of what follows each token, by transformers: [len(ids), vocabulary]."""
    with torch.no_grad():
        return demo.reference(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)


def killing(town: RealTown, request: str, after: int) -> list[str]:
    """The decode worker dies when this request has so many tokens. Who was killed."""
    killed: list[str] = []

    def before(sender: str, receiver: str, message: msg.Message) -> None:
        here = isinstance(message, msg.Decoded) and not killed
        if here and len(town.outcomes[request].tokens) == after:
            killed.append(sender)
            town.kill(sender)

    town.before = before
    return killed


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prefills", [0, 1])
def test_logprobs_are_the_models_own(demo: Model, prefills: int, sampling: SamplingParams) -> None:
    (prompt,) = demo.clear_prompts([19], 12)
    with RealTown(demo, prefills=prefills) as town:
        (tokens,) = town.ask([prompt], 12, [sampling], logprobs=3)
        given = town.outcomes["q0"].logprobs
    all_of_them = expected(demo, [*prompt, *tokens])[len(prompt) - 1 : -1]
    assert len(given) == len(tokens)
    for token, logprob, row in zip(tokens, given, all_of_them, strict=True):
        assert logprob.value == pytest.approx(float(row[token]), abs=CLOSE)
        assert logprob.top_values == pytest.approx(row.topk(3).values.tolist(), abs=CLOSE)
        assert [float(row[i]) for i in logprob.top_ids] == pytest.approx(
            logprob.top_values, abs=CLOSE
        )


@pytest.mark.parametrize("chunk", [7, WHOLE])
@pytest.mark.parametrize("prefills", [0, 1])
def test_the_prompts_own_logprobs_whatever_is_cached(
    demo: Model, prefills: int, chunk: int
) -> None:
    (prompt,) = demo.clear_prompts([53], 6)
    with RealTown(demo, prefills=prefills, chunk=chunk) as town:
        plain = town.ask([prompt], 6)
        town.submit("s", prompt, 6, sampling=GREEDY, prompt_logprobs=2, logprobs=0)
        town.submit("beside", prompt, 6, sampling=GREEDY)
        town.run_all(["s", "beside"])
        seen, beside = town.outcomes["s"], town.outcomes["beside"]
    assert [seen.tokens, beside.tokens] == [*plain, *plain]
    rows = expected(demo, prompt)[:-1]
    assert len(seen.scores) == len(prompt) - 1
    for token, score, row in zip(prompt[1:], seen.scores, rows, strict=True):
        assert score.value == pytest.approx(float(row[token]), abs=CLOSE)
        assert score.top_values == pytest.approx(row.topk(2).values.tolist(), abs=CLOSE)
    assert not beside.scores


def test_a_prompt_is_scored_once_though_its_worker_dies(demo: Model) -> None:
    (prompt,) = demo.clear_prompts([40], 12)
    with RealTown(demo, chunk=9) as town:
        calm = town.ask([prompt], 12)[0]
        killed = killing(town, "s", 5)
        town.submit("s", prompt, 12, sampling=GREEDY, prompt_logprobs=0, logprobs=0)
        town.run_all(["s"])
        seen = town.outcomes["s"]
    assert killed
    assert seen.tokens == calm
    assert (len(seen.scores), len(seen.logprobs)) == (39, 12)


@pytest.mark.parametrize("prefills", [0, 1])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_an_answer_fits_its_grammar_though_its_worker_dies(
    demo: Model, prefills: int, sampling: SamplingParams
) -> None:
    pattern = r"[0-9]{3}-[a-f]{4,6}(, [0-9]+ apples)?"
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    (prompt,) = demo.clear_prompts([9], 90)
    asked = {"r": regex(pattern), "j": json_schema(schema)}

    def answers(town: RealTown) -> dict[str, tuple[str, list[int], list[str]]]:
        for name, grammar in asked.items():
            town.submit(name, prompt, 90, sampling=sampling, grammar=grammar)
        town.run_all(asked)
        return {n: (o.text, o.tokens, o.ends) for n in asked for o in [town.outcomes[n]]}

    with RealTown(demo, prefills=prefills, eos=demo.files.eos_token_ids) as town:
        calm = answers(town)
    text, _, ends = calm["r"]
    assert ends == ["stop"]
    assert re.fullmatch(pattern, text)
    text, _, ends = calm["j"]
    if ends == ["stop"]:  # a small model may count for ever
        assert json.loads(text).keys() == {"name", "age"}
    with RealTown(demo, prefills=prefills, eos=demo.files.eos_token_ids) as town:
        killed = killing(town, "r", 4)
        assert answers(town) == calm
        assert killed


def test_a_grammar_that_cannot_be_is_the_requests_fault_alone(demo: Model) -> None:
    (prompt,) = demo.clear_prompts([9], 6)
    with RealTown(demo) as town:
        plain = town.ask([prompt], 6)
        town.submit("bad", prompt, 6, sampling=GREEDY, grammar='{"kind":"regex","pattern":"("}')
        town.submit("good", prompt, 6, sampling=GREEDY)
        town.run_all(["bad", "good"])
        assert town.outcomes["bad"].ends == ["invalid_grammar"]
        assert [town.outcomes["good"].tokens] == plain


def test_stop_ids_end_an_answer_but_not_before_the_least_number_of_tokens(demo: Model) -> None:
    (prompt,) = demo.clear_prompts([12], 20)
    with RealTown(demo) as town:
        (plain,) = town.ask([prompt], 20)
        stop = plain[6]
        first = plain.index(stop)
        options = {"sampling": GREEDY, "stop_token_ids": (stop,)}
        town.submit("stops", prompt, 20, **options)
        town.submit("with it", prompt, 20, include_stop=True, **options)
        town.submit("later", prompt, 20, min_tokens=first + 2, **options)
        town.run_all(["stops", "with it", "later"])
        stops, with_it = town.outcomes["stops"], town.outcomes["with it"]
        later = town.outcomes["later"]
    assert (stops.tokens, stops.ends) == (plain[: first + 1], ["stop"])
    assert with_it.tokens == stops.tokens
    assert len(with_it.text) > len(stops.text)
    assert with_it.text.startswith(stops.text)
    assert stop not in later.tokens[: first + 2]
    assert len(later.tokens) >= first + 2


def test_penalties_count_what_was_generated_on_whatever_worker(demo: Model) -> None:
    (prompt,) = demo.clear_prompts([12], 30)
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    with RealTown(demo) as town:
        for name, params in (("plain", GREEDY), ("calm", sampling)):
            town.submit(name, prompt, 30, sampling=params)
        town.run_all(["plain", "calm"])
        plain, calm = (town.outcomes[name].tokens for name in ("plain", "calm"))
        killed = killing(town, "p", 9)
        town.submit("p", prompt, 30, sampling=sampling)
        town.run_all(["p"])
        assert killed
        assert town.outcomes["p"].tokens == calm
    assert len(set(calm)) > len(set(plain))
