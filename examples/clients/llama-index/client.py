"""LlamaIndex: complete, chat, streams, structured output, tools, an index over embeddings.

Needs a chat model.
"""

import os

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

MODEL, BASE = os.environ["MODEL"], os.environ["OPENAI_BASE_URL"]


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


def weather(city: str) -> str:
    """The weather of a city."""
    return f"Rain in {city}, 4 degrees."


def main() -> None:
    """All of it."""
    model = OpenAILike(
        model=MODEL, api_base=BASE, api_key="none", is_chat_model=True, is_function_calling_model=True,
        context_window=4096, max_tokens=80, temperature=0,
    )  # fmt: skip
    ask = [ChatMessage(role="user", content="Name the capital of France.")]
    whole = model.chat(ask).message.content
    assert "".join(part.delta or "" for part in model.stream_chat(ask)) == whole
    print("chat:", whole)
    text = OpenAILike(model=MODEL, api_base=BASE, api_key="none", max_tokens=8, temperature=0)
    print("complete:", repr(str(text.complete("Once upon a"))))
    shaped = model.as_structured_llm(City).chat(ask).raw
    assert isinstance(shaped, City)
    print("structured:", shaped)
    tool = FunctionTool.from_defaults(weather)
    answer = model.chat_with_tools(
        [tool], user_msg="What is the weather in Oslo?", tool_required=True
    )
    (call, *_) = model.get_tool_calls_from_response(answer)
    print("tool:", call.tool_name, call.tool_kwargs, tool(**call.tool_kwargs))
    vectors = OpenAILikeEmbedding(model_name=MODEL, api_base=BASE, api_key="none")
    facts = ["Oslo is the capital of Norway.", "A cat has four legs.", "Rain is wet."]
    index = VectorStoreIndex.from_documents(
        [Document(text=each) for each in facts], embed_model=vectors
    )
    found = index.as_query_engine(llm=model, similarity_top_k=1).query(
        "Which city is the capital of Norway?"
    )
    print("index:", found.source_nodes[0].text, "->", str(found)[:60])


if __name__ == "__main__":
    main()
