"""DSPy: Predict, ChainOfThought and typed outputs, by its chat and its JSON adapter.

Needs a chat model.
"""

import os
from typing import Literal

import dspy


class Mood(dspy.Signature):
    """Say how the writer feels."""

    text: str = dspy.InputField()
    mood: Literal["glad", "sad"] = dspy.OutputField()


def main() -> None:
    """The JSON adapter sends a schema, so its answers are typed; the other's are as good as the model."""
    model = dspy.LM(
        f"openai/{os.environ['MODEL']}", api_base=os.environ["OPENAI_BASE_URL"],
        temperature=0, max_tokens=200, cache=False,
    )  # fmt: skip
    print("LM:", model("Name the capital of France.")[0])
    dspy.configure(lm=model, adapter=dspy.JSONAdapter())
    found = dspy.Predict(Mood)(text="What a lovely day!")
    assert found.mood in ("glad", "sad")
    print("Predict:", found.mood)
    numbers = dspy.Predict("question -> answer: int")(question="How many days has a week?")
    assert isinstance(numbers.answer, int)
    print("typed:", numbers.answer)
    thought = dspy.ChainOfThought("question -> answer")(question="Is Oslo in Norway?")
    assert thought.reasoning
    print("ChainOfThought:", thought.answer[:60])


if __name__ == "__main__":
    main()
