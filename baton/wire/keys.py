"""CURVE keys: authentication of peers over tcp. One folder, two key pairs.

    router.secret   identifies the router; stays on its machine
    router.public   workers and clients check the router by it
    member.secret   identifies members (workers and clients); copy it with care
    member.public   the router admits peers that hold the matching secret

The files hold 40 characters of Z85 each (ZeroMQ RFC 32); secrets are readable by their owner only. One
that belongs to root may be readable by a group, too: root chose it, as Kubernetes does for Secrets with
fsGroup.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from baton.errors import InputError
from baton.package import COMMAND

NAMES = ("router.secret", "router.public", "member.secret", "member.public")


@dataclass(frozen=True, slots=True)
class ClusterKeys:
    """The keys of one process. Only a router has `router_secret`."""

    router_public: bytes
    member_public: bytes
    member_secret: bytes = field(repr=False)
    router_secret: bytes | None = field(default=None, repr=False)


def make_keys(folder: Path) -> None:
    """Write new keys to a new or empty folder of mode 0700. InputError if it is not empty."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(
                f"{folder} is not empty: keys are never overwritten; name a new folder"
            )
        folder.chmod(0o700)
    except OSError as error:
        raise InputError(f"cannot make the key folder {folder}: {error.strerror}") from error
    for role in ("router", "member"):
        public, secret = zmq.curve_keypair()
        _write(folder / f"{role}.public", public, 0o644)
        _write(folder / f"{role}.secret", secret, 0o600)


def load_keys(folder: Path, *, router: bool = False) -> ClusterKeys:
    """The keys in this folder. InputError if one is missing, or readable by other users."""
    wanted = NAMES if router else NAMES[1:]
    found = {name: _read(folder / name) for name in wanted}
    return ClusterKeys(**{name.replace(".", "_"): key for name, key in found.items()})


def _write(path: Path, key: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)


def _read(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
        status = path.stat()
    except OSError as error:
        raise InputError(
            f"cannot read the key {path}: {error.strerror}; make keys with `{COMMAND} keys DIR`"
        ) from error
    try:
        bytes_of_key = len(z85.decode(key))
    except (ValueError, KeyError, struct.error):
        bytes_of_key = 0
    if bytes_of_key != 32:
        raise InputError(f"{path} is not a CURVE key: a key is 40 characters of Z85, 32 bytes")
    mode = status.st_mode & 0o777
    if path.name.endswith(".secret") and is_exposed(mode, owner=status.st_uid, reader=os.getuid()):
        raise InputError(f"{path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`")
    return key


def is_exposed(mode: int, *, owner: int, reader: int) -> bool:
    """Whether a secret file of this mode may be used by more users than it is meant for. `owner` and
    `reader` are user ids."""
    lent_by_root = owner == 0 != reader
    return bool(mode & (0o037 if lent_by_root else 0o077))
