"""`python -m tests.cluster.impatient_server ...`: the HTTP server's own command, but a body may take one
second, not ten, and after an error half a second is read on, not two."""

import baton.server.connection
import baton.server.guard
from baton.server.__main__ import main

if __name__ == "__main__":
    baton.server.guard.BODY_S = 1.0
    baton.server.connection.LINGER_S = 0.5
    main(prog_name="python -m server")
