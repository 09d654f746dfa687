"""`python main.py keys DIR`: new CURVE keys, and what to do with each file."""

from pathlib import Path

from baton.package import spelled
from baton.wire.keys import make_keys

WHAT_IS_WHAT = """\
The keys are in {folder}:
  router.secret   stays on the router's machine; never copy it
  router.public   tells clients and workers which router is the right one
  member.secret   makes its holder a member of the cluster: copy it to their machines, and guard it
  member.public   the router lets in whoever holds the secret to this

On the router's machine:
  python -m router --address tcp://HOST:7000 --keys {folder}
Copy the folder without router.secret to every other machine, then there:
  python -m prefill_worker --router tcp://HOST:7000 --keys {folder}
  python -m decode_worker --router tcp://HOST:7000 --keys {folder}
  python main.py --router tcp://HOST:7000 --keys {folder} -b 4 -l 100 -o test.txt"""


def make(folder: Path) -> str:
    """Make the keys; the text to print. InputError if there is something in the folder."""
    make_keys(folder)
    return spelled(WHAT_IS_WHAT).format(folder=folder)
