"""The gate of an owner of frames over tcp: a socket with CURVE at which writers get tickets for their
lanes (sealing.py). A thread answers, so that a busy owner delays nobody who attaches."""

import contextlib
import threading

import msgpack
import zmq

from baton.errors import TransferError
from baton.transfer.curve import CurveKeys, secure_server
from baton.transfer.frame_codec import MAX_LANES
from baton.transfer.knock import Knock
from baton.transfer.sealing import Ticket, Tickets

VERSION = 1
QUESTION_BYTES = 1 << 12  # the messages of a CURVE handshake count too
ANSWER_BYTES = 1 << 14


def encode_question(lanes: int) -> bytes:
    """A writer asks for tickets for so many lanes."""
    return msgpack.packb([VERSION, "lanes", lanes])


def decode_question(message: bytes) -> int | None:
    """How many lanes; None unless it is well-formed and of this version."""
    match _unpacked(message, QUESTION_BYTES):
        case [1, "lanes", lanes] if type(lanes) is int and 0 < lanes <= MAX_LANES:
            return lanes
    return None


def encode_answer(tickets: list[Ticket]) -> bytes:
    """The owner gives these."""
    fields = [[t.name, t.secret, t.to_owner, t.to_writer] for t in tickets]
    return msgpack.packb([VERSION, "tickets", fields])


def decode_answer(message: bytes) -> list[Ticket] | None:
    """The tickets; None unless it is well-formed and of this version."""
    match _unpacked(message, ANSWER_BYTES):
        case [1, "tickets", [*rows]]:
            tickets = [ticket for row in rows if (ticket := _ticket(row)) is not None]
            return tickets if len(tickets) == len(rows) else None
    return None


def _ticket(row: object) -> Ticket | None:
    match row:
        case [bytes(name), bytes(secret), bytes(to_owner), bytes(to_writer)]:
            with contextlib.suppress(ValueError):
                return Ticket(name, secret, to_owner, to_writer)
    return None


def _unpacked(message: bytes, most: int) -> object:
    if len(message) > most:
        return None
    try:
        return msgpack.unpackb(message)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None


class Gate:
    """Until its context ends."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], host: str, keys: CurveKeys, tickets: Tickets
    ) -> None:
        """Listens at a port of its own. `host`: as in an endpoint. zmq.ZMQError if it cannot."""
        self._tickets = tickets
        socket = context.socket(zmq.ROUTER)
        try:
            socket.linger, socket.maxmsgsize = 0, QUESTION_BYTES
            secure_server(socket, keys, tickets.admit)
            socket.setsockopt(zmq.IPV6, int("[" in host))
            socket.bind(f"tcp://{host}:*")
        except zmq.ZMQError:
            socket.close()
            raise
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        name = "kv-tickets"
        threading.Thread(target=self._serve, args=(socket,), name=name, daemon=True).start()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        try:
            while True:
                identity, *parts = socket.recv_multipart()
                lanes = decode_question(parts[0]) if len(parts) == 1 else None
                if lanes is not None:
                    answer = encode_answer(self._tickets.issue(lanes))
                    with contextlib.suppress(zmq.Again):  # it does not read what it asked for
                        socket.send_multipart([identity, answer], zmq.NOBLOCK)
        except zmq.ContextTerminated:
            socket.close()


def ask_for_tickets(
    endpoint: str, lanes: int, keys: CurveKeys, server_key: bytes, within_s: float
) -> list[Ticket]:
    """The writer's side: tickets for so many lanes. TransferError if there are none."""
    knock = Knock(endpoint, keys, server_key)
    try:
        tickets = decode_answer(knock.ask(encode_question(lanes), within_s))
    finally:
        knock.close()
    if tickets is None or len(tickets) != lanes:
        raise TransferError("the owner's answer is malformed: it runs another version")
    return tickets
