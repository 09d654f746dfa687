"""mini-swe-agent: a coding agent with a shell as its only tool, three steps with their results.

Needs a chat model.
"""

import os
from typing import Any

from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel


class Shell(LocalEnvironment):
    """Runs nothing: a small model's commands are for nobody's machine."""

    commands: list[str] = []  # noqa: RUF012

    def execute(self, action: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """As if the command had found a note."""
        self.commands.append(action["command"])
        return {"output": "The secret word is plum.", "returncode": 0, "exception_info": ""}


def main() -> None:
    """The tool is required: the model is too small to choose well."""
    model = LitellmModel(
        model_name=f"openai/{os.environ['MODEL']}", cost_tracking="ignore_errors",
        model_kwargs={
            "temperature": 0, "max_tokens": 120, "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    )  # fmt: skip
    agent = DefaultAgent(
        model, Shell(), system_template="You are a helpful assistant with a shell.",
        instance_template="{{ task }}", step_limit=3,
    )  # fmt: skip
    agent.run("Print the file note.txt.")
    roles = [each["role"] for each in agent.messages]
    assert len(Shell.commands) == 3, roles
    print("turns:", *roles)
    for command in Shell.commands:
        print("command:", command[:100])


if __name__ == "__main__":
    main()
