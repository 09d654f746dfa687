"""What a server is started with."""

from dataclasses import dataclass
from pathlib import Path


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
    stream_interval_s: float = 0.02  # so long a stream's tokens may wait to be told together
    shutdown_s: float = 30.0
    certificate: Path | None = None
    private_key: Path | None = None
    otlp_endpoint: str = ""
    log_level: str = "info"
    log_format: str = "text"
    fd: int | None = None  # a listening socket that is there already
    parent: int | None = None
