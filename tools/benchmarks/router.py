"""What the router costs: a real Router among pretend workers, on a virtual clock.

    python main.py bench router --workers 256 --running 10000
    python main.py bench router --wire --workers 16 --running 1000

R requests run, as many wait, and half of the W workers decode. The figures of the first table are CPU
time of the router alone: messages are neither packed nor sent, and text is not decoded.

    place          the step that places a request in the stead of one that has just ended (median)
    request        all that a request costs but its tokens: submit, place, fill, start, end (median)
    step           a turn in which nothing happens, every worker's heartbeat once a second (mean)
    watched        the same with 1,000 clients that follow the cluster
    token          a decode worker reports one token of each of its runs; the step after it included
    token of 10    the same with ten tokens of each run (of both the quickest round)
    death          a decode worker dies: its requests are queued again; the step after it, which places
                   them, included
    decision       who fills a prompt, of the adaptive policy, just after a worker has begun or ended
                   something (median)

`--wire` starts a real router process's loop, and another process in the place of all others. It says what
the router's process spends with msgpack and ZeroMQ, and how much its main thread can carry.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from baton.table import seconds, table
from baton.wire.messages import GetClusterInfo
from router.role_policy import RolePolicy
from tools.benchmarks.pretend_cluster import PretendCluster
from tools.benchmarks.router_wire import carried

HEADER = ("W", "R", "place", "request", "step", "watched", "token", "token of 10", "death",
          "decision")  # fmt: skip
WIRE = ("W", "R", "tokens a message", "request", "requests/s", "token", "main thread", "tokens/s")
IDLE_S = 0.01
"""Virtual time between idle turns."""
TURNS, PLACES, ROUNDS, WATCHERS, DECISIONS = 300, 100, 5, 1000, 200


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured at which size."""

    workers: int
    running: int
    prompt: int
    tokens: int
    near: bool


def measured(case: Case) -> list[str]:
    """One line of the table."""
    new = 100 + 11 * ROUNDS * (1 + case.tokens // case.running)  # no request may end by itself
    town = PretendCluster(case.workers, case.running, prompt=case.prompt, new=new, near=case.near)
    town.submit(2 * case.running, "submit all")
    town.answer_all("fill all")
    assert sum(map(len, town.decoding.values())) == case.running
    decodes = sorted(town.decoding)
    found = [*_placed(town, decodes), _idle(town, "step")]
    for index in range(WATCHERS):
        town.handle(f"client-{index}", GetClusterInfo(), "watch")
    town.step("watch")
    found.append(_idle(town, "watched"))
    found += [_tokens(town, case, decodes, each) for each in (1, 10)]
    decision = _decided(case)
    town.kill(decodes[0], "death")
    town.step("death")
    found += [town.spent["death"], decision]
    return [f"{case.workers}", f"{case.running:,}", *map(seconds, found)]


def _placed(town: PretendCluster, decodes: list[str]) -> tuple[float, float]:
    """Seconds of the step that places, and of a whole request without its tokens."""
    placing, whole = [], []
    for index in range(PLACES):
        spent = dict(town.spent)
        town.submit(1, "request")
        busy = [name for name in decodes if town.decoding[name]]
        town.finish(busy[index % len(busy)], "request")
        town.step("place")
        town.answer_all("request")
        placing.append(town.spent["place"] - spent.get("place", 0.0))
        whole.append(placing[-1] + town.spent["request"] - spent.get("request", 0.0))
    return statistics.median(placing), statistics.median(whole)


def _idle(town: PretendCluster, kind: str) -> float:
    """Seconds of a turn in which nothing happens."""
    for _ in range(TURNS):
        town.now += IDLE_S
        town.step(kind)
    return town.spent[kind] / town.calls[kind]


def _tokens(town: PretendCluster, case: Case, decodes: list[str], each: int) -> float:
    """Seconds for each token, in the quickest of some rounds: other work on the machine slows all."""
    costs = []
    for number in range(ROUNDS):
        kind, count = f"token of {each}, round {number}", 0
        while count < case.tokens * each:
            for name in decodes:
                count += town.tokens(name, each, kind)
                town.step(kind)
        costs.append(town.spent[kind] / count)
    return min(costs)


def _decided(case: Case) -> float:
    """Seconds of one decision, in a cluster of its own whose router chooses for each request."""
    town = PretendCluster(
        case.workers, case.running, prompt=case.prompt, new=DECISIONS + 100, near=case.near,
        policy=RolePolicy.ADAPTIVE,
    )  # fmt: skip
    town.submit(2 * case.running, "submit all")
    town.answer_all("fill all")
    decodes, costs = sorted(town.decoding), []
    for index in range(DECISIONS):
        busy = [name for name in decodes if town.decoding[name]]
        town.submit(1, "more")
        town.finish(busy[index % len(busy)], "end")
        town.answer_all("place")
        costs.append(town.decide())
    return statistics.median(costs)


def on_the_wire(case: Case, each: int) -> list[str]:
    """One line of the second table."""
    (request, request_main), (token, main) = carried(
        case.workers, case.running, each, max(case.tokens, 2 * case.running) * each
    )
    counts = (f"{1 / request_main:,.0f}", f"{1 / main:,.0f}")
    return [
        f"{case.workers}", f"{case.running:,}", f"{each}",
        seconds(request), counts[0], micros(token), micros(main), counts[1],
    ]  # fmt: skip


def micros(value: float) -> str:
    """Microseconds with a decimal."""
    return f"{value * 1e6:.1f} µs"


def option(name: str, default: Sequence[int], text: str) -> Callable[..., Callable[..., None]]:
    """A size that may be given several times."""
    return click.option(
        name,
        multiple=True,
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help=text,
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@option("--workers", (4, 64, 256), "W; half of them decode.")
@option("--running", (100, 1000, 10_000), "R, requests on workers; as many are queued.")
@click.option("--prompt", default=64, show_default=True, help="Tokens of each prompt.")
@click.option("--tokens", default=5_000, show_default=True, help="Tokens of each round, at least.")
@click.option("--near", is_flag=True, help="The workers share the router's host, and its cores.")
@click.option("--wire", is_flag=True, help="A real process: with msgpack and ZeroMQ.")
def main(
    workers: tuple[int, ...], running: tuple[int, ...], prompt: int, tokens: int, near: bool,
    wire: bool,
) -> None:  # fmt: skip
    """What the router costs, in CPU time."""
    began = time.monotonic()
    rows = []
    for count in workers:
        if count % 2:
            raise click.ClickException(f"half of the workers decode: {count} is odd")
        for each in running:
            case = Case(count, each, prompt, tokens, near)
            if wire:
                rows += [on_the_wire(case, together) for together in (1, 10)]
            else:
                rows.append(measured(case))
    click.echo(table(WIRE if wire else HEADER, rows))
    click.echo(f"Python {platform.python_version()}; {seconds(time.monotonic() - began)}")


if __name__ == "__main__":
    main(prog_name="python main.py bench router")
