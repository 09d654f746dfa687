"""CURVE for KV sockets that leave the machine: keys, and authentication of clients.

By default ZeroMQ accepts every client that knows the server's public key. Each exporting context
therefore runs a ZAP handler that accepts the trusted keys only, in a thread that ends with the
context.
"""

import threading
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


def secure_server(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    """Accept only clients with a trusted key. Call this before bind."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.zap_domain = b"baton-kv"
    gate = socket.context.socket(zmq.REP)
    gate.linger = 0
    gate.bind("inproc://zeromq.zap.01")
    thread = threading.Thread(target=_guard, args=(gate, keys.trusted), name="kv-gate", daemon=True)
    thread.start()


def secure_client(socket: zmq.Socket[bytes], keys: CurveKeys, server: bytes) -> None:
    """Authenticate as these keys to the server. Call this before connect."""
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = server


def _guard(gate: zmq.Socket[bytes], trusted: frozenset[bytes]) -> None:
    """Answer ZeroMQ's authentication requests (RFC 27) until the context ends."""
    try:
        while True:
            request = gate.recv_multipart()
            key = z85.encode(request[6]) if len(request) == 7 and request[5] == b"CURVE" else b""
            verdict = [b"200", b"OK"] if key in trusted else [b"400", b"not a trusted key"]
            gate.send_multipart(
                [b"1.0", request[1] if len(request) > 1 else b"", *verdict, b"", b""]
            )
    except zmq.ContextTerminated:
        gate.close()
