"""ClusterOptions: what a cluster is started with. Each option is declared here once.

From a declaration follow the field of ClusterOptions, the option of `python main.py`, the same option
of the process that uses it (`python -m decode_worker --help`), and the child's command line. A new
option takes a declaration here and its use in the process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any

import click

from baton.adapters.below import FLAG, updates_folder
from baton.adapters.files import absolute_lora, refuse_ranks
from baton.adapters.identity import MOST
from baton.dtypes import DTYPES, KV_DTYPES, refuse_narrow_kv
from baton.kv.transports import CHOICES
from baton.model_files import absolute_name
from baton.topology import Topology, gpus_of

ROLE_POLICIES = ("split", "colocated", "adaptive")  # router/role_policy.py
MODEL = "The model"
PROCESSES = "Processes and devices"  # headings in the help of main.py

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class FiniteRange(click.FloatRange):
    """A range that does not let nan through."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


@dataclass(frozen=True, slots=True)
class Declaration:
    """One option: its command line and the processes (router, prefill, decode) that take it."""

    name: str
    default: Any
    processes: tuple[str, ...]
    section: str
    help: str
    type: Any = None
    metavar: str | None = None
    show_default: str | bool = True
    switch: str | None = None  # of a boolean: its two flags, --on/--off
    multiple: bool = False  # it is a tuple, and may be given again and again

    def click_option(self, make: Callable[..., Decorator] = click.option) -> Decorator:
        """As an option of a command; `make` takes the arguments of click.option."""
        names = [self.switch or flag(self.name), self.name]
        more = {"multiple": True} if self.multiple else {}
        return make(*names, default=self.default, type=self.type, metavar=self.metavar,
                    show_default=self.show_default, help=self.help, **more)  # fmt: skip

    def arguments(self, value: Any) -> list[str]:
        """On the command line of a process; empty for the default."""
        if value == self.default:
            return []
        if self.switch is not None:
            return [self.switch.split("/")[0 if value else 1]]
        values = value if self.multiple else (value,)
        return [part for each in values for part in (flag(self.name), str(each))]


def _declared(default: Any, *processes: str, **declaration: Any) -> Any:
    return field(
        default=default, metadata={"default": default, "processes": processes, **declaration}
    )


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """What a cluster is started with. The first three have commands of their own in each process."""

    model: str
    topology: Topology
    batch_size: int
    dtype: str = _declared(
        "auto", "prefill", "decode", section=MODEL, type=click.Choice(DTYPES),
        help="auto: bfloat16 on a GPU, float32 on a CPU.",
    )  # fmt: skip
    kv_cache_dtype: str = _declared(
        "auto", "prefill", "decode", section=MODEL, type=click.Choice(KV_DTYPES),
        help="auto: that of the computation. int8: a quarter of the memory and of what is sent, and "
        "slightly other answers; on a CPU.",
    )  # fmt: skip
    max_model_len: int | None = _declared(
        None, "router", "prefill", "decode", section=MODEL, type=click.IntRange(min=2),
        metavar="TOKENS", show_default="the model's context",
        help="Prompt and answer together; less needs less memory.",
    )  # fmt: skip
    kv_cache_memory_bytes: int | None = _declared(
        None, "decode", section=MODEL, type=click.IntRange(min=1), metavar="BYTES",
        show_default="enough for a full batch of the longest sequences, if it fits",
        help="KV pool of a decode worker. If it fills up, the youngest requests are preempted.",
    )  # fmt: skip
    block_size: int = _declared(
        16, "prefill", "decode", section=MODEL, type=click.IntRange(min=1), metavar="TOKENS",
        help="Tokens in one KV block; the same for all workers of a cluster.",
    )  # fmt: skip
    prefix_caching: bool = _declared(
        True, "prefill", "decode", section=MODEL, show_default="on",
        switch="--enable-prefix-caching/--no-enable-prefix-caching",
        help="Keep the KV of finished sequences for prompts with the same prefix.",
    )  # fmt: skip
    prefill_cache_memory_bytes: int | None = _declared(
        None, "prefill", section=MODEL, type=click.IntRange(min=0), metavar="BYTES",
        show_default="the room for one prompt, on a CPU at most 1/16 of the free memory",
        help="KV that a prefill worker keeps for prompts with the same prefix, where it cannot read the "
        "decode worker's pool.",
    )  # fmt: skip
    speculative_model: str | None = _declared(
        None, "decode", section=MODEL, metavar="NAME", show_default="none",
        help="Draft tokens, with the same answers: ngram, or a small model of the same vocabulary.",
    )  # fmt: skip
    num_speculative_tokens: int = _declared(
        4, "decode", section=MODEL, type=click.IntRange(1, 32), metavar="TOKENS",
        help="The most draft tokens of a sequence in one step.",
    )  # fmt: skip
    lora: tuple[str, ...] = _declared(
        (), "router", "prefill", "decode", section=MODEL, multiple=True, metavar="NAME=FOLDER",
        show_default="none",
        help="A LoRA adapter as peft writes it, for requests whose model is NAME; repeatable.",
    )  # fmt: skip
    allow_lora_updates: str | None = _declared(
        None, "router", "prefill", "decode", section=MODEL, metavar="FOLDER", show_default="off",
        help="Clients may load and unload adapters while it serves (/v1/load_lora_adapter), from folders "
        "below this one only.",
    )  # fmt: skip
    max_loras: int = _declared(
        32, "router", section=MODEL, type=click.IntRange(1, MOST), metavar="N",
        help="Adapters at once, those of --lora too, beyond which none can be loaded.",
    )  # fmt: skip
    kv_transport: str = _declared(
        "auto", "prefill", "decode", section=PROCESSES, type=click.Choice(CHOICES),
        help="How KV blocks get from prefill to decode; auto takes the fastest that works. nixl (between "
        "hosts, not encrypted) is used only where both workers ask for it.",
    )  # fmt: skip
    batch_window_ms: float = _declared(
        10.0, "router", section=PROCESSES, type=FiniteRange(0, 60_000), metavar="MS",
        help="The longest a prompt waits for others to be prefilled with. A lone prompt never waits; "
        "0 disables the delay.",
    )  # fmt: skip
    max_num_batched_tokens: int = _declared(
        2048, "prefill", "decode", section=PROCESSES, type=click.IntRange(min=1), metavar="TOKENS",
        help="Tokens in one forward; longer prompts are prefilled in chunks.",
    )  # fmt: skip
    role_policy: str = _declared(
        "split", "router", section=PROCESSES, type=click.Choice(ROLE_POLICIES),
        help="Who prefills a prompt. split: prefill workers; colocated: the decode worker that will "
        "continue it, in chunks; adaptive: whoever is best for each request, by predicted latencies.",
    )  # fmt: skip
    slo_ttft: float | None = _declared(
        None, "router", section=PROCESSES, type=FiniteRange(0, 86_400, min_open=True), metavar="S",
        show_default="10 x that of an idle worker",
        help="adaptive: the first token is wanted within so many seconds.",
    )  # fmt: skip
    slo_itl: float | None = _declared(
        None, "router", section=PROCESSES, type=FiniteRange(0, 86_400, min_open=True), metavar="S",
        show_default="5 x that of an idle worker",
        help="adaptive: the next token is wanted within so many seconds.",
    )  # fmt: skip
    drain_timeout: float = _declared(
        30.0, "prefill", "decode", section=PROCESSES, type=FiniteRange(0, 86_400), metavar="S",
        help="The longest a worker that is told to end (SIGTERM) goes on with what runs there.",
    )  # fmt: skip
    tensor_parallel_size: int = _declared(
        1, "prefill", "decode", section=PROCESSES, type=click.IntRange(1, 64), metavar="N",
        help="Processes of each worker, its ranks: they divide the model's heads and matrices. On GPUs "
        "a worker takes N of them, from its device on.",
    )  # fmt: skip
    prefill_tensor_parallel_size: int | None = _declared(
        None, section=PROCESSES, type=click.IntRange(1, 64), metavar="N", show_default="that number",
        help="The same for prefill workers, where it differs.",
    )  # fmt: skip
    spare_worker: bool | None = _declared(
        None, section=PROCESSES, switch="--spare-worker/--no-spare-worker",
        show_default="for `serve`, if 8 GiB of memory are free",
        help="Keep an idle process that can replace a dead worker at once.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """The processes run in another working folder, so paths become absolute here."""
        object.__setattr__(self, "model", absolute_name(self.model))
        if self.speculative_model not in (None, "ngram"):
            object.__setattr__(self, "speculative_model", absolute_name(self.speculative_model))
        object.__setattr__(self, "lora", tuple(map(absolute_lora, self.lora)))
        if self.allow_lora_updates is not None:
            folder = str(updates_folder(self.allow_lora_updates))
            object.__setattr__(self, "allow_lora_updates", folder)
        ranks = max(self.ranks("prefill"), self.ranks("decode"))
        if self.lora or self.allow_lora_updates is not None:
            asks = "--lora" if self.lora else FLAG
            refuse_ranks(ranks, asks)
        refuse_narrow_kv(self.kv_cache_dtype, ranks)

    def arguments(self, process: str) -> list[str]:
        """The command-line options of a router, prefill or decode worker."""
        found = ["--model", self.model]
        for each in DECLARED:
            if process in each.processes:
                found += each.arguments(getattr(self, each.name))
        return found

    def ranks(self, role: str) -> int:
        """Processes of one worker of this role."""
        own = self.prefill_tensor_parallel_size if role == "prefill" else None
        return self.tensor_parallel_size if own is None else own

    def worker_arguments(self, role: str) -> list[str]:
        """arguments() of one worker, with the number of ranks of its role."""
        own = replace(self, tensor_parallel_size=self.ranks(role))
        return own.arguments(role)


DECLARED = tuple(
    Declaration(each.name, **each.metadata) for each in fields(ClusterOptions) if each.metadata
)


def process_options(process: str) -> Decorator:
    """The declared options of one kind of process, for its click command."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for each in reversed(DECLARED):
            if process in each.processes:
                command = each.click_option()(command)
        return command

    return decorate


def beside(options: ClusterOptions, device: str) -> list[str]:
    """The option that tells a decode worker who shares its GPUs."""
    mine = gpus_of(device, options.ranks("decode"))
    prefills, decodes = (
        sum(not mine.isdisjoint(gpus_of(each, options.ranks(role))) for each in devices)
        for role, devices in (
            ("prefill", options.topology.prefill_devices),
            ("decode", options.topology.decode_devices),
        )
    )
    if prefills + decodes < 2:
        return []
    return ["--beside", str(prefills), str(decodes - 1)]


def flag(name: str) -> str:
    """An option as the user writes it."""
    return "--" + name.replace("_", "-")
