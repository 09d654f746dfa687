"""Knock: a writer's first connection to an owner, over tcp with CURVE: one question, one answer."""

import contextlib

import zmq
from zmq.utils.monitor import parse_monitor_message

from baton.errors import TransferError
from baton.transfer.curve import CurveKeys, secure_client

LINGER_MS = 500


class Knock:
    """Stays connected until close(), so that the end of either side is noticed."""

    def __init__(self, endpoint: str, keys: CurveKeys, server_key: bytes) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger, self._socket.reconnect_ivl = LINGER_MS, -1
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._events = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
        )
        secure_client(self._socket, keys, server_key)
        self._socket.connect(endpoint)

    def ask(self, question: bytes, within_s: float) -> bytes:
        """The owner's answer. TransferError if it refuses this process, or `within_s` is over."""
        limit_ms = int(within_s * 1000)
        self._socket.sndtimeo = limit_ms
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN | zmq.POLLOUT)
        poller.register(self._events, zmq.POLLIN)
        sent = False
        while found := dict(poller.poll(limit_ms)):
            if self._events in found:
                self.tend()
            if not sent and found.get(self._socket, 0) & zmq.POLLOUT:
                self._socket.send(question)
                poller.modify(self._socket, zmq.POLLIN)
                sent = True
            elif found.get(self._socket, 0) & zmq.POLLIN:
                return self._socket.recv()
        raise TransferError(f"no answer within {within_s:g} s")

    def tend(self) -> None:
        """TransferError if the connection is over."""
        while self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise TransferError("the owner refused this process's key: use its --keys folder")
            raise TransferError("the connection was cut")

    def close(self, goodbye: bytes = b"") -> None:
        """Disconnect, after this message if there is one."""
        if goodbye:
            with contextlib.suppress(zmq.ZMQError):  # the connection is over
                self._socket.send(goodbye, zmq.NOBLOCK)
        self._socket.disable_monitor()
        self._events.close(0)
        self._socket.close()
        self._context.term()
