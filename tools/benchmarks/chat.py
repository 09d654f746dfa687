"""`python main.py bench chat`: a chat turn by turn. What does a prefix cost that is there already?

    shared    shared memory: prefill reads the prefix in the decode worker's pool
    kept      a way that copies: prefill keeps what it has computed
    again     the same, but it keeps nothing: it computes the prefix again and sends what decode lacks
    none      the same, and decode keeps nothing either: all is computed and sent again

Each turn's prompt is the chat so far, its answer and new tokens. All clusters run all the time and take
turns, chat by chat, so a slow moment hits all of them; an idle one uses no CPU. Prefill fills every
prompt (--role-policy split). Figures are medians over chats, of the time to the first token and of the
CPU time of the prefill process during the turn. Ratios of times are medians of those within a chat,
ratios of CPU time are those of the sums. Every arm must say the same tokens. The last line printed is
JSON.
"""

import json
import os
import random
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from baton.client.batch import Completion, complete
from baton.client.blocking import Client
from baton.cluster.options import ClusterOptions
from baton.cluster.supervisor import Cluster
from baton.errors import InputError
from baton.params import GenerationParams
from baton.topology import plan_topology
from baton.wire.messages import Submit
from sampler.params import SamplingParams

ARMS = ("shared", "kept", "again", "none")
BASE = "again"
VOCABULARY = 1000  # prompts are of its tokens: any model has so many
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of one chat."""

    prompt_tokens: int
    cached_tokens: int  # found by decode
    reused_tokens: int  # not computed by prefill
    moved_bytes: int
    ttft_s: float
    prefill_cpu_s: float


class Arm:
    """A running cluster."""

    def __init__(self, name: str, options: ClusterOptions, stack: ExitStack) -> None:
        copying = replace(options, kv_transport="frames")
        chosen = {
            "shared": options,
            "kept": copying,
            "again": replace(copying, prefill_cache_memory_bytes=0),
            "none": replace(copying, prefix_caching=False),
        }
        self.name = name
        self._cluster = stack.enter_context(Cluster(chosen[name]))
        self._client = Client(self._cluster.address, supervise=self._cluster.check)
        stack.callback(self._client.close)
        self._client.await_ready()

    def say(self, name: str, prompt: list[int], answer: int) -> tuple[Turn, list[int]]:
        """One turn: its figures and the answer."""
        params = GenerationParams(answer, SamplingParams(temperature=0.0), ignore_eos=True)
        before = self._prefill_cpu_s()
        events = list(complete(self._client, {0: Submit(name, tuple(prompt), params)}, limit=1))
        found = [each for each in events if isinstance(each, Completion)]
        if not found:
            raise InputError(f"{self.name}: a turn failed: {events}")
        took = found[0].timings
        turn = Turn(
            *(len(prompt), took.cached_tokens, took.prefill_reused_tokens, took.moved_bytes),
            *(took.ttft_s, self._prefill_cpu_s() - before),
        )
        return turn, list(found[0].token_ids)

    def _prefill_cpu_s(self) -> float:
        pids = [pid for name, pid in self._cluster.pids().items() if name.startswith("prefill")]
        return sum(map(cpu_s, pids))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all its threads, in ticks of the kernel (mostly 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def talk(arm: Arm, chat: int, turns: int, new: int, answer: int) -> tuple[list[Turn], list[int]]:
    """One chat: its turns and all it says. Its own first token keeps its prefix apart from others'."""
    dice = random.Random(chat)
    said: list[int] = []
    prompt: list[int] = []
    found: list[Turn] = []
    for turn in range(turns):
        prompt = [*prompt, *(dice.randrange(VOCABULARY) for _ in range(new))]
        figures, tokens = arm.say(f"chat-{chat}-{turn}", prompt, answer)
        found.append(figures)
        said += tokens
        prompt += tokens
    return found, said


def table(found: Mapping[str, list[list[Turn]]]) -> list[str]:
    """By turn and arm: medians over chats, and medians of the ratios to BASE within a chat."""
    lines = ["turn  prompt  arm     cached  reused   moved MB   TTFT ms  x base   CPU ms  x base"]
    for turn in range(len(found[BASE][0])):
        base = [chat[turn] for chat in found[BASE]]
        for name, chats in found.items():
            here = [chat[turn] for chat in chats]
            ttft, cpu = [each.ttft_s for each in here], [each.prefill_cpu_s for each in here]
            by_ttft = statistics.median(a / b.ttft_s for a, b in zip(ttft, base, strict=True))
            by_cpu = sum(cpu) / max(TICK_S, sum(each.prefill_cpu_s for each in base))
            lines.append(
                f"{turn + 1:4}  {here[0].prompt_tokens:6,}  {name:6}  {here[0].cached_tokens:6,}  "
                f"{here[0].reused_tokens:6,}  {here[0].moved_bytes / 1e6:9.1f}  "
                f"{1000 * statistics.median(ttft):8.0f}  {by_ttft:6.2f}  "
                f"{1000 * statistics.median(cpu):7.0f}  {by_cpu:6.2f}"
            )
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="random:gpt2-4k", show_default=True)
@click.option("--turns", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--new-tokens", default=128, show_default=True, help="Of the user, in each turn.")
@click.option("--answer-tokens", default=32, show_default=True, help="Of each answer.")
@click.option("--chats", default=3, show_default=True, help="After one that is not counted.")
@click.option("--arm", "arms", multiple=True, default=ARMS, type=click.Choice(ARMS))
def main(
    model: str,
    turns: int,
    new_tokens: int,
    answer_tokens: int,
    chats: int,
    arms: tuple[str, ...],
) -> None:
    """A chat turn by turn: what does a prefix cost that is there already?"""
    topology = plan_topology((), (), gpus=0)
    options = ClusterOptions(model, topology, batch_size=4, role_policy="split")
    names = list(dict.fromkeys((*arms, BASE)))
    found: dict[str, list[list[Turn]]] = {name: [] for name in names}
    with ExitStack() as stack:
        running = [Arm(name, options, stack) for name in names]
        for chat in range(chats + 1):
            said: list[list[int]] = []
            for arm in running:
                figures, tokens = talk(arm, chat, turns, new_tokens, answer_tokens)
                said.append(tokens)
                if chat:
                    found[arm.name].append(figures)
            if any(each != said[0] for each in said):
                raise InputError(f"chat {chat}: the arms say different tokens")
    click.echo("\n".join(table(found)))
    whole = {name: [[asdict(t) for t in chat] for chat in all_] for name, all_ in found.items()}
    click.echo(json.dumps({"model": model, "base": BASE, "chats": whole}))


if __name__ == "__main__":
    main(prog_name="python main.py bench chat")
