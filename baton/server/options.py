"""The options and settings of an HTTP server, for `python -m server` and `python main.py serve`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from baton.errors import InputError

LONGEST_KEY = 512


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One HTTP server."""

    router: str
    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_names: tuple[str, ...] = ()  # empty: the model's own
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    chat_template: Path | None = None
    keys: Path | None = None
    max_queued: int = 256  # requests without a first token
    stream_interval_s: float = 0.02  # longest delay of a stream's tokens, to be sent together
    shutdown_s: float = 30.0
    certificate: Path | None = None
    private_key: Path | None = None
    otlp_endpoint: str = ""
    log_level: str = "info"
    log_format: str = "text"
    fd: int | None = None  # an inherited listening socket
    parent: int | None = None


_OPTIONS = [
    click.option("--host", default="127.0.0.1", show_default=True,
                 help="Address to listen on; anything but this machine should have --api-key."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
                 help="Port to listen on; 0: any that is free."),
    click.option("--served-model-name", multiple=True, metavar="NAME",
                 help="What clients call the model; repeatable.  [default: the model's own name]"),
    click.option("--api-key", multiple=True, metavar="KEY",
                 help="Ask for this key; repeatable. Others see it in `ps`: prefer the file."),
    click.option("--api-key-file", type=click.Path(path_type=Path, dir_okay=False), default=None,
                 help="Keys, one a line."),
    click.option("--allowed-host", multiple=True, metavar="NAME",
                 help="A name this server answers to, beside localhost and --host; * for any."),
    click.option("--allowed-origin", multiple=True, metavar="URL",
                 help="A web page's origin that may ask, beside this server's own; * for any."),
    click.option("--chat-template", type=click.Path(path_type=Path, dir_okay=False), default=None,
                 help="A Jinja file instead of the model's own."),
    click.option("--max-num-queued-reqs", type=click.IntRange(min=1), default=256,
                 show_default=True, help="Requests that may wait for their first token; then 503."),
    click.option("--stream-interval-ms", type=click.FloatRange(0, 1000), default=20.0,
                 show_default=True,
                 help="Tokens made within so long may come in one chunk of a stream, longer among many "
                 "streams (at most 100 ms); 0: each by itself."),
    click.option("--shutdown-timeout", type=click.FloatRange(min=0), default=30.0,
                 show_default=True, help="Seconds that running requests may take after SIGTERM."),
    click.option("--ssl-certfile", type=click.Path(path_type=Path, dir_okay=False), default=None,
                 help="Certificate, for https."),
    click.option("--ssl-keyfile", type=click.Path(path_type=Path, dir_okay=False), default=None,
                 help="Its private key."),
    click.option("--otlp-endpoint", default="", metavar="URL",
                 help="Send OpenTelemetry traces there (needs packages, see docs/serving.md)."),
    click.option("--log-format", type=click.Choice(("text", "json")), default="text",
                 show_default=True, help="A line for people, or a JSON object a line."),
]  # fmt: skip


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_from(given: Mapping[str, Any]) -> ServerSettings:
    """From the values of the options. Raises InputError."""
    keys = (*given["api_key"], *_keys_in(given["api_key_file"]))
    for key in keys:
        if not 0 < len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable():
            raise InputError(f"an API key must have 1 to {LONGEST_KEY} printable ASCII characters")
    if (given["ssl_certfile"] is None) != (given["ssl_keyfile"] is None):
        raise InputError("--ssl-certfile and --ssl-keyfile belong together: give both or neither")
    return ServerSettings(
        router=given["router"] or "",
        model=given["model"],
        host=given["host"],
        port=given["port"],
        served_names=given["served_model_name"],
        api_keys=keys,
        allowed_hosts=given["allowed_host"],
        allowed_origins=given["allowed_origin"],
        chat_template=given["chat_template"],
        keys=given.get("keys"),
        max_queued=given["max_num_queued_reqs"],
        stream_interval_s=given["stream_interval_ms"] / 1e3,
        shutdown_s=given["shutdown_timeout"],
        certificate=given["ssl_certfile"],
        private_key=given["ssl_keyfile"],
        otlp_endpoint=given["otlp_endpoint"],
        log_level=given.get("log_level", "info"),
        log_format=given["log_format"],
        fd=given.get("fd"),
        parent=given.get("parent"),
    )


def _keys_in(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --api-key-file {file}: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise InputError(f"--api-key-file {file} holds no key: write one a line")
    return keys
