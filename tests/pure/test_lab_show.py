"""The report in a browser: the page made of it, and the files that are served."""

import os
import re
import signal
import threading
import urllib.error
import urllib.request
import webbrowser
from html.parser import HTMLParser
from pathlib import Path

import pytest

from baton.cli import main as program
from baton.offline.interrupts import SIGNALS
from tests.patience import PATIENCE_S
from tools.lab.page import page
from tools.lab.report import render
from tools.lab.show import Server, answer
from tools.lab.study import Failure, Picture, Saved, Study, Table

VOID = {"meta", "img", "br"}


def report() -> str:
    study = Study(
        name="baseline", title="Baseline", question="Why?", varied="a < b", fixed={"model": "tiny"},
        command="python main.py lab baseline", findings=("**It is.** So `a & b`.",),
        tables=(Table("Stages", ("stage", "ms"), (("a|b", "1.00"),)),),
        pictures=(Picture("baseline-stages.png", 'A "caption" (log scale)'),),
        failures=(Failure("x", "y < z"),),
        quotations={"It wrote": "<script>alert(1)</script> [x](javascript:alert(1)) **bold**"},
    )  # fmt: skip
    return render([Saved(study, {"machine": "a box"}, {"date": "today"})])


class Tags(HTMLParser):
    """Checks that every element is closed, in order; collects ids and targets."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        found = dict(attrs)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        self.targets += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert not tags.open
    return tags


def test_a_page_is_whole_html_whose_links_lead_somewhere() -> None:
    tags = read(page(report()))
    assert {"h1", "h2", "h3", "table", "ul", "pre", "img", "strong", "em", "code"} <= set(tags.seen)
    inside = [each[1:] for each in tags.targets if each.startswith("#")]
    assert inside
    assert set(inside) <= tags.ids
    assert "baseline-stages.png" in tags.targets


def test_what_a_model_wrote_is_text_and_nothing_else() -> None:
    text = page(report())
    assert "script" not in read(text).seen
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [x](javascript:alert(1)) **bold**" in text
    assert not re.search(r'(href|src)="[a-z]+:', text)


def test_cells_keep_their_bars_and_numbers_stand_to_the_right() -> None:
    text = page(report())
    assert "<td>a|b</td>" in text
    assert '<td class="right">1.00</td>' in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "report"
    inside.mkdir()
    (inside / "README.md").write_text(report())
    (inside / "a.png").write_bytes(b"png")
    (inside / "notes.txt").write_text("mine")
    (tmp_path / "secret.json").write_text("{}")
    (inside / "link.json").symlink_to(tmp_path / "secret.json")
    return inside


def test_the_page_and_the_files_of_its_folder_are_served(folder: Path) -> None:
    assert answer(folder, "/").body == answer(folder, "/README.md").body == page(report()).encode()
    assert (answer(folder, "/a.png?x=1").status, answer(folder, "/a.png").body) == (200, b"png")


@pytest.mark.parametrize(
    "target",
    ["/notes.txt", "/gone.png", "/../secret.json", "/%2e%2e/secret.json", "/..%2fsecret.json",
     "/link.json", "//secret.json", "/a.png/", "/report", "/%2fetc%2fpasswd"],
)  # fmt: skip
def test_nothing_else_is_served(folder: Path, target: str) -> None:
    assert answer(folder, target).status == 404


def test_it_is_served_over_http_to_this_machine_by_its_own_name(folder: Path) -> None:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert server.server_address[0] == "127.0.0.1"
            with urllib.request.urlopen(server.url, timeout=PATIENCE_S) as got:
                assert got.read() == page(report()).encode()
                assert "default-src 'none'" in got.headers["Content-Security-Policy"]
            other = urllib.request.Request(server.url, headers={"Host": "elsewhere.example"})
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(other, timeout=PATIENCE_S)
            (folder / "README.md").unlink()
            with pytest.raises(urllib.error.HTTPError, match="500"):
                urllib.request.urlopen(server.url, timeout=PATIENCE_S)
        finally:
            server.shutdown()
            thread.join()


def test_a_report_that_is_there_is_shown_and_nothing_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got: list[bytes] = []

    def visit(url: str) -> None:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answered:
            got.append(answered.read())
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C, once the page has been seen

    def browser(url: str) -> bool:
        threading.Thread(target=visit, args=(url,)).start()
        return True

    monkeypatch.setattr(webbrowser, "open", browser)
    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        assert program.main(["lab", "--open", "--output", str(folder)]) == 0
    finally:  # a program that was interrupted ignores further signals; pytest must not
        for each, handler in handlers.items():
            signal.signal(each, handler)
    said = capsys.readouterr().out
    assert got == [page(report()).encode()]
    assert re.match(r"serving   http://127\.0\.0\.1:\d+/; Ctrl-C ends it", said)
    assert "===" not in said
