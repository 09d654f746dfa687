"""CURVE for KV sockets that leave the machine: keys, and authentication of clients.

By default ZeroMQ accepts every client that knows the server's public key. Each exporting context
therefore runs a ZAP handler that accepts the trusted keys only, in a thread that ends with the
context. Sockets of the same context may ask for a login instead (ZeroMQ's PLAIN), see sealing.py.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """This process's key pair and the public keys it trusts, in Z85 (40 bytes each). Without `peers`
    all processes of the cluster share this one pair. ValueError for a key of another length."""

    public: bytes
    secret: bytes = field(repr=False)
    peers: frozenset[bytes] = frozenset()

    def __post_init__(self) -> None:
        for key in (self.public, self.secret, *self.peers):
            if len(key) != 40:
                raise ValueError(f"a CURVE key has 40 characters (Z85), got {len(key)}")

    @property
    def trusted(self) -> frozenset[bytes]:
        """The public keys of other processes that may connect or be connected to."""
        return self.peers or frozenset((self.public,))


Admit = Callable[[bytes, bytes], bool]
"""Name and secret -> whether they let a connection in."""


def _nobody(name: bytes, secret: bytes) -> bool:
    return False


def secure_server(socket: zmq.Socket[bytes], keys: CurveKeys, admit: Admit = _nobody) -> None:
    """Accept only clients with a trusted key. Call this before bind, for one socket of a context.
    `admit`, called in a thread: who gets into the context's sockets that login_server() prepared."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.zap_domain = b"baton-kv"
    gate = socket.context.socket(zmq.REP)
    gate.linger = 0
    gate.bind("inproc://zeromq.zap.01")
    order = (gate, keys.trusted, admit)
    threading.Thread(target=_guard, args=order, name="kv-gate", daemon=True).start()


def login_server(socket: zmq.Socket[bytes]) -> None:
    """Accept only clients that log in; their messages have the name as "User-Id". Call this before bind,
    after secure_server() for another socket of the context."""
    socket.plain_server = True
    socket.zap_domain = b"baton-kv"


def login_client(socket: zmq.Socket[bytes], name: bytes, secret: bytes) -> None:
    """Log in. Call this before connect."""
    socket.plain_username, socket.plain_password = name, secret


def secure_client(socket: zmq.Socket[bytes], keys: CurveKeys, server: bytes) -> None:
    """Authenticate as these keys to the server. Call this before connect."""
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = server


def _guard(gate: zmq.Socket[bytes], trusted: frozenset[bytes], admit: Admit) -> None:
    """Answer ZeroMQ's authentication requests (RFC 27) until the context ends."""
    try:
        while True:
            request = gate.recv_multipart()
            verdict, name = [b"400", b"not a trusted key"], b""
            match request[5:]:
                case [b"CURVE", key] if z85.encode(key) in trusted:
                    verdict = [b"200", b"OK"]
                case [b"PLAIN", user, secret] if admit(user, secret):
                    verdict, name = [b"200", b"OK"], user
            number = request[1] if len(request) > 1 else b""
            gate.send_multipart([b"1.0", number, *verdict, name, b""])
    except zmq.ContextTerminated:
        gate.close()
