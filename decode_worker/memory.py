"""What a decode worker does when the memory did not suffice for a forward. Pure."""

from collections.abc import Mapping, Sequence

from baton.pace import TokenBudget
from decode_worker.runs import Run, RunStep


def take_less(runs: Mapping[str, Run], steps: Sequence[RunStep], budget: TokenBudget) -> str | None:
    """Undo these steps: nothing of the forward counts. None if the next has fewer tokens, of fewer runs
    if it must be; otherwise the run whose only token did not fit."""
    for each in steps:
        runs[each.run].computed -= len(each.row.token_ids) - len(each.draft)
    tokens = sum(len(each.row.token_ids) for each in steps)
    return None if budget.ran_out(tokens) else steps[0].run
