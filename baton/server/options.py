"""The options of an HTTP server, each declared here once, and the listening socket they name.

From a declaration follow the field of ServerSettings, the option of `python main.py serve` and of
`python -m server`, and the argument that the first passes to the second.
"""

import errno
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click

from baton.adapters.below import FLAG, updates_folder
from baton.errors import InputError
from baton.params import POOLINGS
from baton.tool_calls import FORMATS

LONGEST_KEY = 512
BACKLOG = 1024
METRIC_NAME = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")
FILE = click.Path(path_type=Path, dir_okay=False)


def _option(flag: str, default: Any, help: str, **more: Any) -> Any:
    """A field that is an option. `more`: further arguments of click.option."""
    if "multiple" not in more:
        more |= {"default": default, "show_default": default not in (None, "")}
    return field(default=default, metadata={"flag": flag, "click": more | {"help": help}})


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One HTTP server."""

    router: str
    model: str
    host: str = _option(
        "--host", "127.0.0.1",
        "Address to listen on; anything but this machine should have --api-key."
    )  # fmt: skip
    port: int = _option(
        "--port", 8000, "Port to listen on; 0: any that is free.", type=click.IntRange(0, 65535)
    )  # fmt: skip
    served_names: tuple[str, ...] = _option(
        "--served-model-name", (),
        "What clients call the model; repeatable.  [default: the model's own name]",
        multiple=True, metavar="NAME"
    )  # fmt: skip
    api_keys: tuple[str, ...] = _option(
        "--api-key", (), "Require this key; repeatable. `ps` shows it to others: prefer the file.",
        multiple=True, metavar="KEY"
    )  # fmt: skip
    api_key_file: Path | None = _option("--api-key-file", None, "Keys, one a line.", type=FILE)  # noqa: RUF009
    allowed_hosts: tuple[str, ...] = _option(
        "--allowed-host", (),
        "Host name that clients may use, beside localhost and --host; * for any.",
        multiple=True, metavar="NAME"
    )  # fmt: skip
    allowed_origins: tuple[str, ...] = _option(
        "--allowed-origin", (),
        "Origin whose web pages may call this server, beside its own; * for any.",
        multiple=True, metavar="URL"
    )  # fmt: skip
    chat_template: Path | None = _option(  # noqa: RUF009
        "--chat-template", None, "A Jinja file instead of the model's own.", type=FILE
    )  # fmt: skip
    reasoning: str = _option(
        "--reasoning", "auto",
        "Tell reasoning (<think>) apart in chats, where the template knows it; or not.",
        type=click.Choice(("auto", "off"))
    )  # fmt: skip
    tool_call_parser: str = _option(
        "--tool-call-parser", "auto",
        "How the model writes calls of tools; auto: as its chat template says.",
        type=click.Choice(("auto", *FORMATS))
    )  # fmt: skip
    pooling: str = _option(
        "--embedding-pooling", "mean",
        "What /v1/embeddings makes of the tokens' hidden states, unless a request says it.",
        type=click.Choice(POOLINGS)
    )  # fmt: skip
    max_queued: int = _option(
        "--max-num-queued-reqs", 256,
        "Requests that may wait for their first token; then 503.", type=click.IntRange(min=1)
    )  # fmt: skip
    requests_per_key: int = _option(
        "--max-requests-per-key", 0,
        "Requests at once of one API key, or without keys of one address; then 429; 0: no limit.",
        type=click.IntRange(min=0)
    )  # fmt: skip
    tokens_per_key: int = _option(
        "--max-tokens-per-minute-per-key", 0,
        "Tokens a minute, of prompts and answers, of one key or address; then 429; 0: no limit.",
        type=click.IntRange(min=0)
    )  # fmt: skip
    queue_timeout_s: float = _option(
        "--queue-timeout", 60.0,
        "Seconds that a request may wait until a worker takes it; then 503; 0: no limit.",
        type=click.FloatRange(0, 86_400)
    )  # fmt: skip
    request_timeout_s: float = _option(
        "--request-timeout", 0.0,
        "Seconds that a request may take in all, and the most that its field timeout may ask for; "
        "then 504; 0: no limit.", type=click.FloatRange(0, 86_400)
    )  # fmt: skip
    stream_interval_ms: float = _option(
        "--stream-interval-ms", 20.0,
        "Tokens made within so long may come in one chunk of a stream, longer among many "
        "streams (at most 100 ms); 0: each by itself.", type=click.FloatRange(0, 1000)
    )  # fmt: skip
    shutdown_s: float = _option(
        "--shutdown-timeout", 30.0,
        "Seconds that running requests may take after SIGTERM.", type=click.FloatRange(min=0)
    )  # fmt: skip
    certificate: Path | None = _option("--ssl-certfile", None, "Certificate, for https.", type=FILE)  # noqa: RUF009
    private_key: Path | None = _option("--ssl-keyfile", None, "Its private key.", type=FILE)  # noqa: RUF009
    otlp_endpoint: str = _option(
        "--otlp-endpoint", "",
        "Send OpenTelemetry traces there (needs packages, see docs/serving.md).", metavar="URL"
    )  # fmt: skip
    metrics_prefix: str = _option(
        "--metrics-prefix", "baton:",
        "How the names at /metrics begin; with vllm: dashboards for vLLM fit.", metavar="PREFIX"
    )  # fmt: skip
    log_format: str = _option(
        "--log-format", "text",
        "A line for people, or a JSON object a line.", type=click.Choice(("text", "json"))
    )  # fmt: skip
    allow_lora_updates: Path | None = None  # also an option of the cluster's processes
    log_level: str = "info"
    keys: Path | None = None  # folder of CURVE keys
    fd: int | None = None  # an inherited listening socket
    parent: int | None = None  # process id: this process ends when that one does
    pulse: int | None = None  # an inherited pipe, in which the event loop shows that it turns

    def arguments(self) -> list[str]:
        """Its options on the command line of `python -m server`; API keys only as a file's name."""
        found = ["--log-level", self.log_level]
        if self.allow_lora_updates is not None:
            found += [FLAG, str(self.allow_lora_updates)]
        for each in DECLARED:
            value = getattr(self, each.name)
            if each.name not in ("port", "api_keys") and value != each.default:
                for one in value if isinstance(value, tuple) else (value,):
                    path = isinstance(one, Path)
                    found += [each.metadata["flag"], str(one.resolve() if path else one)]
        return found


DECLARED = tuple(each for each in fields(ServerSettings) if each.metadata)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a click command."""
    for each in reversed(DECLARED):
        declared = each.metadata
        command = click.option(declared["flag"], each.name, **declared["click"])(command)
    return command


def settings_from(given: Mapping[str, Any]) -> ServerSettings:
    """Settings from the values of the options. Raises InputError."""
    names = {each.name for each in fields(ServerSettings)}
    known = {name: given[name] for name in given if name in names}
    if (folder := known.get("allow_lora_updates")) is not None:
        known["allow_lora_updates"] = updates_folder(folder)
    found = ServerSettings(**known | {"router": given["router"] or ""})
    keys = (*found.api_keys, *_keys_in(found.api_key_file))
    for key in keys:
        if not 0 < len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable():
            raise InputError(f"an API key must have 1 to {LONGEST_KEY} printable ASCII characters")
    if not METRIC_NAME.fullmatch(found.metrics_prefix):
        raise InputError(
            f"--metrics-prefix {found.metrics_prefix!r:.60} cannot begin the name of a metric: it must "
            f"match {METRIC_NAME.pattern}, such as baton: or vllm:"
        )
    if (found.certificate is None) != (found.private_key is None):
        raise InputError("--ssl-certfile and --ssl-keyfile belong together: give both or neither")
    return replace(found, api_keys=keys, api_key_file=None)


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


def key_lines(keys: tuple[str, ...]) -> bytes:
    """The content of a file as --api-key-file reads it."""
    return "".join(f"{key}\n" for key in keys).encode()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError if the address cannot be bound."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(
            f"--host {host} is not an address of this machine: {error.strerror}"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use by another process: stop that one, or use --port"
            ) from error
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}, port {port}: {why}") from error
    listener.setblocking(False)
    return listener


def adopt(descriptor: int) -> socket.socket:
    """The listening socket inherited from the parent. Raises InputError."""
    with suppress(OSError):
        listener = socket.socket(fileno=descriptor)
        listener.setblocking(False)
        return listener
    raise InputError(f"--fd {descriptor} is not a socket")
