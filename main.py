"""`python main.py`: the command line of a checkout. An installed package has it as `baton`."""

import sys

from baton.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
