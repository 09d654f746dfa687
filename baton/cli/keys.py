"""`python main.py keys DIR`: create CURVE keys, and explain the files."""

from pathlib import Path

from baton.package import spelled
from baton.wire.keys import make_keys

WHAT_IS_WHAT = """\
The keys are in {folder}:
  router.secret   stays on the router's machine; never copy it
  router.public   lets clients and workers verify the router
  member.secret   admits clients and workers to the cluster: copy it to their machines, keep it secret
  member.public   lets the router verify members

On the router's machine:
  python -m router --address tcp://HOST:7000 --keys {folder}
Copy the folder without router.secret to every other machine, then there:
  python -m prefill_worker --router tcp://HOST:7000 --keys {folder}
  python -m decode_worker --router tcp://HOST:7000 --keys {folder} --kv-host ADDRESS
  python main.py --router tcp://HOST:7000 --keys {folder} -b 4 -l 100 -o test.txt
HOST is the router's address. ADDRESS is the decode worker's own, at which prefill workers reach it."""


def make(folder: Path) -> str:
    """Make the keys. Returns the text to print; raises InputError if the folder is not empty."""
    make_keys(folder)
    return spelled(WHAT_IS_WHAT).format(folder=folder)
