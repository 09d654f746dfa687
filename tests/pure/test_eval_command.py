"""The command's refusals, and what is made of a server that is busy, wrong or none. No torch."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from baton.cli import main
from baton.client.http import HttpClient
from baton.errors import InputError, ProtocolError
from baton.model_files import resolve_model
from baton.text import Tokenizer
from tools.evaluation.lines import read_text
from tools.evaluation.server import PROBE, Patient, ServerSubject
from tools.evaluation.subject import Span

DEMO = resolve_model("demo")
Answer = tuple[int, Any]  # status, and what the body holds (bytes: as they are)
Serve = Callable[[list[Answer]], str]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("perplexity --device cpu --url http://x", "--device is of use not with --url"),
        ("core --served-model x", "--served-model is of use only with --url"),
        ("core --bundle /nowhere", "core.yaml cannot be read: No such file"),
        ("perplexity --text /nowhere", "/nowhere cannot be read: No such file"),
        ("--json /nowhere/x.json", "there is no folder /nowhere"),
        ("perplexity --model demoo", "did you mean demo"),
        ("--url localhost:8000", "--url must begin with http:// or https://"),
        ("--url http://127.0.0.1:1", "no server answers at http://127.0.0.1:1"),
        ("--model demo core", "--model belongs behind 'core', or to eval alone"),
        ("perplexity --stride 0", "0 is not in the range"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["eval", *arguments.split()]) in (2, 3)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert words in said


def test_a_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"one\r\ntwo\n")
    assert read_text(tmp_path / "text.txt") == "one\r\ntwo\n"


@pytest.mark.parametrize("command", ["", "perplexity", "generation", "core"])
def test_every_option_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", *command.split(), "--help"]) == 0
    assert "--url" in capsys.readouterr().out


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A server that gives these answers, one after the other, and the last one for ever."""
    running: list[ThreadingHTTPServer] = []

    def start(answers: list[Answer]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, found = answers.pop(0) if len(answers) > 1 else answers[0]
                body = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                if status == 503:
                    self.send_header("Retry-After", "7")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def models(*names: str) -> Answer:
    return 200, {"data": [{"id": name, "max_model_len": 100} for name in names]}


def echoed(ids: list[int], *, words: list[str] | None = None) -> Answer:
    """As a server answers that foresees every token with 1/e, the second one rather otherwise."""
    tokenizer = Tokenizer(DEMO.tokenizer_file)
    logprobs = {
        "tokens": words or [tokenizer.decode([each]) for each in ids],
        "token_logprobs": [None, *[-1.0] * len(ids)],
        "top_logprobs": [None, {"x": -0.5}, *[{"x": -1.0}] * (len(ids) - 1)],
    }
    return 200, {"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}


def probe() -> Answer:
    return echoed(Tokenizer(DEMO.tokenizer_file).encode(PROBE))


def test_a_busy_server_is_asked_again_after_what_it_says(serve: Serve) -> None:
    pauses: list[float] = []
    site = HttpClient(serve([(503, {}), (503, {}), (200, {"fine": 1})]))
    assert Patient(site, pauses.append).ask("/x") == {"fine": 1}
    assert pauses == [7.0, 7.0]


def test_a_server_that_stays_busy_is_given_up(serve: Serve) -> None:
    site = HttpClient(serve([(503, {"error": {"message": "too\nmany"}})]))
    with pytest.raises(InputError, match="says 503: too many"):
        Patient(site, pause=lambda s: None).ask("/x")


def test_a_refusal_is_told_in_the_servers_words(serve: Serve) -> None:
    with pytest.raises(InputError, match="says 401: who are you"):
        Patient(HttpClient(serve([(401, {"error": {"message": "who are you"}})]))).ask("/v1/models")


def test_what_is_no_json_is_no_answer(serve: Serve) -> None:
    with pytest.raises(ProtocolError, match="answers no JSON"):
        Patient(HttpClient(serve([(200, b"<html>")]))).ask("/v1/models")


def test_scores_are_those_of_the_echoed_prompt(serve: Serve) -> None:
    url = serve([models("demo"), probe(), echoed([5, 6, 7])])
    subject = ServerSubject(HttpClient(url), DEMO, served=None)
    assert (subject.about.context, subject.about.longest) == (100, 99)
    (found,) = subject.score([Span((5, 6, 7), 1)])
    assert found.logprobs == (-1.0, -1.0)
    assert found.likeliest == (False, True)


def test_a_server_without_the_likeliest_tokens_is_refused(serve: Serve) -> None:
    status, answer = probe()
    answer["choices"][0]["logprobs"]["top_logprobs"] = None
    with pytest.raises(ProtocolError, match="it cannot be asked to score"):
        ServerSubject(HttpClient(serve([models("demo"), (status, answer)])), DEMO, served=None)


@pytest.mark.parametrize("served", [None, "c"])
def test_which_of_several_models_must_be_said(serve: Serve, served: str | None) -> None:
    with pytest.raises(InputError, match=r"serves a, b, and .*: use --served-model"):
        ServerSubject(HttpClient(serve([models("a", "b")])), DEMO, served=served)


def test_a_server_with_another_tokenizer_is_refused(serve: Serve) -> None:
    ids = Tokenizer(DEMO.tokenizer_file).encode(PROBE)
    other = echoed(ids, words=["other"] * len(ids))
    with pytest.raises(InputError, match="has another tokenizer"):
        ServerSubject(HttpClient(serve([models("demo"), other])), DEMO, served=None)


def test_a_server_that_cannot_score_is_refused(serve: Serve) -> None:
    mute = 200, {"choices": [{"index": 0, "text": "", "logprobs": None}]}
    with pytest.raises(ProtocolError, match="it cannot be asked to score"):
        ServerSubject(HttpClient(serve([models("demo"), mute])), DEMO, served=None)
