"""`python -m server`: the HTTP server for a running cluster, from a checkout. Installed: `baton http`."""

from baton.server.__main__ import main

if __name__ == "__main__":
    main(prog_name="python -m server")
