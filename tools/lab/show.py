"""Show: the report in a browser, served on this machine alone until Ctrl-C."""

import webbrowser
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import click

from baton.errors import OutputError
from baton.offline.interrupts import Interrupted
from tools.lab.page import page

REPORT = "README.md"
KINDS = {".png": "image/png", ".jsonl": "text/plain", ".json": "application/json"}
HERE = "127.0.0.1"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",  # a study may have run again
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent."""

    status: int
    kind: str
    body: bytes


def answer(folder: Path, target: str) -> Answer:
    """The page, or a file of the report's own folder. Anything else is not found."""
    name = unquote(target.partition("?")[0]).removeprefix("/")
    if name in ("", REPORT):
        text = (folder / REPORT).read_text(encoding="utf-8")
        return Answer(200, "text/html; charset=utf-8", page(text).encode())
    path = folder / name
    kind = KINDS.get(path.suffix)
    if kind is None or "/" in name or "\\" in name or path.is_symlink() or not path.is_file():
        return Answer(404, "text/plain; charset=utf-8", b"not a file of this report\n")
    return Answer(200, f"{kind}; charset=utf-8", path.read_bytes())


class Server(ThreadingHTTPServer):
    """The report of one folder, on a port that the system chooses."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__((HERE, 0), Handler)
        self.folder = folder

    @property
    def url(self) -> str:
        return f"http://{HERE}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """GET only. A name other than this machine's is refused, so that no page of elsewhere can read it."""

    server: Server

    def do_GET(self) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HERE}:{port}", f"localhost:{port}"):
            found = Answer(403, "text/plain; charset=utf-8", b"ask 127.0.0.1\n")
        else:
            try:
                found = answer(self.server.folder, self.path)
            except OSError as error:
                text = f"the report cannot be read: {error.strerror}\n"
                found = Answer(500, "text/plain; charset=utf-8", text.encode())
        self.send_response(found.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", found.kind)
        self.send_header("Content-Length", str(len(found.body)))
        self.end_headers()
        self.wfile.write(found.body)

    def log_message(self, format: str, *args: object) -> None:
        """A person reads the report, not a log of its pictures."""


def show(folder: Path) -> None:
    """Serve the report and open a browser. Returns at Ctrl-C. Raises OutputError without a report."""
    if not (folder / REPORT).is_file():
        raise OutputError(f"{folder} holds no report: run `python main.py lab` first")
    with Server(folder) as server:
        opened = webbrowser.open(server.url)
        how = "" if opened else " (no browser was found: open it yourself)"
        click.echo(f"serving   {server.url}{how}; Ctrl-C ends it")
        try:
            server.serve_forever()
        except (KeyboardInterrupt, Interrupted):
            click.echo("")
