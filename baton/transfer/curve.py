"""CURVE for the KV sockets that leave the machine: keys, and who may connect.

Without a gatekeeper ZeroMQ lets in every client that knows the server's public key; so each
exporting context has one, which lets in the listed peers only: a thread that ends with its context.
"""

import threading
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """This process's key pair and the public keys it trusts, in Z85 (40 bytes each). No `peers`
    means: all processes of the cluster share this one pair."""

    public: bytes
    secret: bytes = field(repr=False)
    peers: frozenset[bytes] = frozenset()

    def __post_init__(self) -> None:
        for key in (self.public, self.secret, *self.peers):
            if len(key) != 40:
                raise ValueError(f"a CURVE key has 40 characters (Z85), got {len(key)}")

    @property
    def trusted(self) -> frozenset[bytes]:
        """Public keys of those we talk to."""
        return self.peers or frozenset((self.public,))


def secure_server(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    """Before bind: only holders of a trusted key get through."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.zap_domain = b"baton-kv"
    gate = socket.context.socket(zmq.REP)
    gate.linger = 0
    gate.bind("inproc://zeromq.zap.01")
    thread = threading.Thread(target=_guard, args=(gate, keys.trusted), name="kv-gate", daemon=True)
    thread.start()


def secure_client(socket: zmq.Socket[bytes], keys: CurveKeys, server: bytes) -> None:
    """Before connect."""
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = server


def _guard(gate: zmq.Socket[bytes], trusted: frozenset[bytes]) -> None:
    """Answer ZeroMQ's questions (RFC 27) until the context ends."""
    try:
        while True:
            question = gate.recv_multipart()
            key = z85.encode(question[6]) if len(question) == 7 and question[5] == b"CURVE" else b""
            verdict = [b"200", b"OK"] if key in trusted else [b"400", b"not a trusted key"]
            gate.send_multipart(
                [b"1.0", question[1] if len(question) > 1 else b"", *verdict, b"", b""]
            )
    except zmq.ContextTerminated:
        gate.close()
