"""`cache`: what compiled code and models take on disk, and how much they may."""

import time

from baton.cache import (
    Entry,
    cache_root,
    clear,
    entries,
    keep_within_limit,
    limit,
    parsed_size,
    set_limit,
)
from baton.table import amount, seconds, table

DAY_S = 86400.0


def run_cache(*, wanted: str | None, clearing: bool) -> str:
    """Set the limit if `wanted` is one, delete everything if `clearing`; what to print."""
    if wanted is not None:
        set_limit(parsed_size(wanted))
        keep_within_limit()
    if clearing:
        gone = clear()
        kept = len(entries())
        being = f"; {kept} in use just now stay" if kept else ""
        return f"{len(gone)} files deleted, {amount(sum(each.size for each in gone))}{being}"
    return shown(entries(), limit(), time.time())


def shown(found: list[Entry], most: int, now: float) -> str:
    """The files as a table, the most recently used first, and the sum."""
    total = (
        f"{amount(sum(each.size for each in found))} of at most {amount(most)} in {cache_root()}"
    )
    if not found:
        return total
    rows = [
        (f"{each.what} {each.name}", amount(each.size), _ago(max(0.0, now - each.used)))
        for each in found
    ]
    return f"{table(('file', 'size', 'last used'), rows)}\n\n{total}"


def _ago(age_s: float) -> str:
    if age_s >= 2 * DAY_S:
        return f"{age_s / DAY_S:.0f} days ago"
    if age_s >= 7200:
        return f"{age_s / 3600:.0f} hours ago"
    return f"{seconds(float(round(age_s)))} ago"
