"""`python -m tools.faults`: the reliability battery."""

import time
from pathlib import Path

import click

from tools.faults import rows_kill
from tools.faults.battery import Battery

ROWS = {"F1": rows_kill.f1, "F2": rows_kill.f2, "F3": rows_kill.f3, "F4": rows_kill.f4}


@click.command()
@click.option("--seed", type=int, default=1)
@click.option("--scale", type=float, default=1.0)
@click.option("--only", multiple=True)
def main(seed, scale, only):
    folder = Path("build/faults")
    folder.mkdir(parents=True, exist_ok=True)
    b = Battery(seed, scale, folder, print)
    b.make_reference()
    for name, row in ROWS.items():
        if only and name not in only:
            continue
        t = time.monotonic()
        for r in row(b):
            print(time.monotonic() - t, r)


main()
