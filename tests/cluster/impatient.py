"""`python -m tests.cluster.impatient WORKER ...`: a worker's own command, but its longest step is said
to take two seconds, not ten: a test need not wait so long until a stalled one is given up."""

import sys

import baton.cluster.launch
import decode_worker.__main__
import prefill_worker.__main__

COMMANDS = {
    "prefill_worker": prefill_worker.__main__.main,
    "decode_worker": decode_worker.__main__.main,
}

if __name__ == "__main__":
    baton.cluster.launch.PATIENCE_FLOOR_S = 2.0
    COMMANDS[sys.argv[1]](sys.argv[2:])
