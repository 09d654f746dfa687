"""Numbers that are none of JSON enter neither a prompt nor a store."""

import asyncio

import pytest

from baton import finite
from baton.server.turns import ContentForm, variants
from tests.pure.town_app import serving


@pytest.mark.parametrize(
    "text", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", '{"a": [1e400]}']
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        finite.loads(text)


def test_numbers_stay_as_they_are() -> None:
    assert finite.loads('{"a": [1e308, -0.0, 12345678901234567890, 1e-999]}') == {
        "a": [1e308, -0.0, 12345678901234567890, 0.0]
    }


def test_arguments_with_such_a_number_are_shown_as_the_model_wrote_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1e999}'}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    (found, *_) = variants(turns, ContentForm.TEXT)
    assert found[0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1e999}'


def test_a_body_with_such_a_number_is_refused_whatever_it_asks_for() -> None:
    use = '{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1e999}}'
    said = f'{{"role": "assistant", "content": [{use}]}}'
    asked = {
        "/v1/messages": f'{{"max_tokens": 3, "messages": [{said}]}}',
        "/v1/chat/completions": '{"messages": [], "chat_template_kwargs": {"a": 1e999}}',
        "/v1/responses": '{"input": "a", "metadata": {"a": 1e999}}',
    }

    async def work() -> None:
        async with serving() as client:
            for path, body in asked.items():
                answer = await client.ask(path, body.encode())
                assert answer.status == 400
                assert "1e999" in answer.json["error"]["message"]

    asyncio.run(work())
