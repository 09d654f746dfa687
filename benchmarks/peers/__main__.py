"""`python -m benchmarks.peers`: make an environment for each peer, once."""

import subprocess
import venv
from pathlib import Path

import click

PACKAGES = {"openvino": ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0")}
HOME = Path.home() / ".cache" / "baton" / "peers"


def python_of(peer: str, folder: Path = HOME) -> Path:
    """The interpreter of a peer's environment, whether it is there or not."""
    return folder / peer / "bin" / "python"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("peers", nargs=-1, type=click.Choice(sorted(PACKAGES)))
@click.option("--into", type=click.Path(path_type=Path), default=HOME, show_default=True)
def main(peers: tuple[str, ...], into: Path) -> None:
    """Install peers (all that are known, if none is named) for `bench engine`."""
    for peer in peers or sorted(PACKAGES):
        venv.create(into / peer, with_pip=True)
        python = str(python_of(peer, into))
        subprocess.run([python, "-m", "pip", "install", *PACKAGES[peer]], check=True)
        click.echo(f"{peer} is in {into / peer}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.peers")
