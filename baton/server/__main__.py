"""`python -m server`: the command line of the HTTP server."""

from pathlib import Path
from typing import Any

import click

from baton.adapters.below import FLAG
from baton.cluster.launch import leave_with_one_line
from baton.host import die_with
from baton.log import LEVELS, set_up_logging
from baton.package import COMMAND
from baton.server.options import server_options, settings_from


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--router",
    required=True,
    metavar="ADDRESS",
    help="Where the router listens: ipc://PATH or tcp://HOST:PORT.",
)
@click.option(
    "--model",
    default="demo",
    show_default=True,
    help="The model the cluster serves; its tokenizer and chat template are read here.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help=f"Folder of CURVE keys; needed for tcp. See `{COMMAND} keys`.",
)
@server_options
@click.option(
    FLAG,
    default=None,
    metavar="FOLDER",
    help="Let clients load adapters from below this folder, and unload them; workers need it too.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    default="info",
    show_default=True,
    help="How much is logged to stderr.",
)
@click.option("--fd", type=int, default=None, hidden=True)
@click.option("--parent", type=int, default=None, hidden=True)
@click.option("--pulse", type=int, default=None, hidden=True)
def main(**given: Any) -> None:
    """Serve OpenAI's API over a running cluster, and the page that shows it:

    python -m server --router ipc:///tmp/baton/router.sock --port 8000
    """

    def work() -> int:
        parent = given["parent"]
        if parent is not None and not die_with(parent):
            return 0
        settings = settings_from(given)
        set_up_logging("server", settings.log_level, json_lines=settings.log_format == "json")
        from baton.server.run import serve  # the web framework is loaded from here on

        return serve(settings)

    leave_with_one_line(work)


if __name__ == "__main__":
    main(prog_name="python -m server")
