"""Settings of the offline job: what the command line said, checked as far as it can be at once.

No model is looked at here and nothing is started: that is fitness.py and run.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from baton.errors import InputError
from baton.package import COMMAND
from baton.params import MAX_STOP_CHARACTERS, MAX_STOPS
from baton.topology import Topology, count_gpus, plan_topology
from sampler.params import SamplingParams

DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
OF_OUR_CLUSTER = (
    *("model", "dtype", "max_model_len", "prefill_device", "decode_device", "num_prefill"),
    *("num_decode", "colocated", "kv_transport", "batch_window_ms", "download"),
    *("speculative_model", "num_speculative_tokens", "prefix_caching", "kv_cache_memory_bytes"),
)
MOST_GUESSES = 32
ONLY_WHEN_SAMPLING = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the work is to be done: a cluster of our own, or a running one at `router`."""

    model: str
    dtype: str
    max_model_len: int | None
    kv_cache_memory_bytes: int | None
    topology: Topology | None  # None: the running cluster has its own
    kv_transport: str
    batch_window_ms: float
    speculative_model: str | None
    num_speculative_tokens: int
    prefix_caching: bool
    router: str | None
    keys: Path | None
    download: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """How tokens are to be drawn, as far as the user said so; None leaves it to the model."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    greedy: bool = False


@dataclass(frozen=True, slots=True)
class JobSettings:
    """One offline job."""

    place: Place
    wish: Wish
    batch_size: int
    generation_length: int
    stop: tuple[str, ...]
    ignore_eos: bool
    prompts: tuple[str, ...]
    output: Path
    format: str
    timings: bool
    quiet: bool
    trace: Path | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """The sampling parameters of the job, and what the user should be told about them."""

    params: SamplingParams
    notes: tuple[str, ...]


def place_from(given: Mapping[str, object], said: Callable[[str], bool]) -> Place:
    """`given`: every option's value; `said`: did the user write this one? Raises InputError."""
    _check_router(given, said)
    if given["colocated"]:
        for name in ("prefill_device", "num_prefill"):
            if said(name):
                raise InputError(
                    f"{flag(name)} and --colocated exclude each other: colocated decode workers "
                    "fill their own KV cache"
                )
    for name in ("num_prefill", "num_decode", "max_model_len", "kv_cache_memory_bytes"):
        value = given[name]
        if isinstance(value, int) and value < 1:
            raise InputError(f"{flag(name)} must be at least 1, got {value}")
    window = given["batch_window_ms"]
    assert isinstance(window, float)
    if not 0 <= window <= 60_000:
        raise InputError(f"--batch-window-ms must be 0 (no waiting) to 60000, got {window:g}")
    guesses = _int_or_none(given["num_speculative_tokens"]) or 0
    if not 1 <= guesses <= MOST_GUESSES:
        raise InputError(f"--num-speculative-tokens must be 1 to {MOST_GUESSES}, got {guesses}")
    return Place(
        model=str(given["model"]),
        dtype=str(given["dtype"]),
        max_model_len=_int_or_none(given["max_model_len"]),
        kv_cache_memory_bytes=_int_or_none(given["kv_cache_memory_bytes"]),
        topology=None if given["router"] else _topology(given, said),
        kv_transport=str(given["kv_transport"]),
        batch_window_ms=window,
        speculative_model=_str_or_none(given["speculative_model"]),
        num_speculative_tokens=guesses,
        prefix_caching=bool(given["prefix_caching"]),
        router=_str_or_none(given["router"]),
        keys=Path(str(given["keys"])) if given["keys"] else None,
        download=bool(given["download"]),
    )


def check_numbers(*, batch_size: int, generation_length: int, stop: tuple[str, ...]) -> None:
    """Raise InputError naming the value, the limit and the way out."""
    if batch_size < 1:
        raise InputError(f"-b {batch_size}: at least 1 request must run at once; 4 is the default")
    if generation_length < 1:
        raise InputError(
            f"-l {generation_length}: at least 1 token must be generated; 100 is the default"
        )
    if len(stop) > MAX_STOPS:
        raise InputError(f"at most {MAX_STOPS} --stop strings, got {len(stop)}: leave some out")
    for each in stop:
        if not 0 < len(each) <= MAX_STOP_CHARACTERS:
            raise InputError(
                f"a --stop string must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(each)}"
            )


def choose_sampling(wish: Wish, default: SamplingParams) -> Drawing:
    """The user's word first, then the model's own. Raises InputError for values that cannot be."""
    if wish.greedy and wish.temperature:
        raise InputError(
            f"--greedy and --temperature {wish.temperature:g} exclude each other: leave one out"
        )
    said = {name: v for name in SAMPLING_FLAGS if (v := getattr(wish, name)) is not None}
    if wish.greedy:
        said["temperature"] = 0.0
    try:
        params = replace(default, **said, seed=wish.seed)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"{flag(name)} {rest}") from error
    idle = [flag(name) for name in ONLY_WHEN_SAMPLING if name in said] if params.greedy else []
    if not idle:
        return Drawing(params, ())
    way_out = "" if "temperature" in said else "; --temperature turns sampling on"
    return Drawing(params, (f"{', '.join(idle)} has no effect: decoding is greedy{way_out}",))


def chosen_prompts(file: str | None) -> tuple[str, ...]:
    """The prompts of `file`, or of prompts.py, which the user edits. Raises InputError."""
    try:
        from prompts import PROMPTS, check_prompts, read_prompts
    except SyntaxError as error:
        raise InputError(
            f"prompts.py, line {error.lineno}: {error.msg}; every prompt stands in quotes with a "
            "comma behind it"
        ) from None
    return tuple(read_prompts(Path(file)) if file is not None else check_prompts(PROMPTS))


def flag(name: str) -> str:
    """The option as the user writes it."""
    return "--" + name.replace("_", "-")


def _check_router(given: Mapping[str, object], said: Callable[[str], bool]) -> None:
    if given["router"] is None:
        if given["keys"]:
            raise InputError("--keys is for a running cluster: add --router tcp://HOST:PORT")
        return
    address = str(given["router"])
    if not re.fullmatch(r"tcp://.+:\d+|ipc://.+", address):
        raise InputError(
            f"--router must be tcp://HOST:PORT or ipc://PATH, as the router printed it, got {address!r}"
        )
    if address.startswith("tcp://") and not given["keys"]:
        raise InputError(
            f"--router {address} needs --keys DIR: tcp is spoken with CURVE keys only; "
            f"`{COMMAND} keys DIR` makes them"
        )
    for name in OF_OUR_CLUSTER:
        if said(name):
            raise InputError(
                f"{flag(name)} is for a cluster that main.py starts itself; the one at {address} "
                "has its own: leave it out"
            )


def _topology(given: Mapping[str, object], said: Callable[[str], bool]) -> Topology:
    return plan_topology(
        () if given["colocated"] else _named(given, said, "prefill"),
        _named(given, said, "decode"),
        prefills=_count(given, "prefill"),
        decodes=_count(given, "decode"),
        colocated=bool(given["colocated"]),
        gpus=usable_gpus(),
    )


def _named(given: Mapping[str, object], said: Callable[[str], bool], role: str) -> tuple[str, ...]:
    """One device for each worker; several workers share the devices named, in turn. Empty if none
    is named, or auto."""
    named = given[f"{role}_device"]
    assert isinstance(named, tuple)
    count = _count(given, role)
    if len(named) > count and said(f"num_{role}"):
        raise InputError(
            f"--num-{role} {count} is less than the {len(named)} times --{role}-device was given"
        )
    for device in named:
        check_device(device, f"--{role}-device")
    if not named or set(named) == {"auto"}:
        return ()
    return tuple(named[i % len(named)] for i in range(max(count, len(named))))


def _count(given: Mapping[str, object], role: str) -> int:
    count = given[f"num_{role}"]
    assert isinstance(count, int)
    return count


def usable_gpus() -> int:
    """GPUs that the installed torch can use, as far as one can tell without it."""
    return 0 if _torch_version().endswith("+cpu") else count_gpus()


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        raise InputError("PyTorch is not installed here: run `make setup`") from None


def check_device(device: str, option: str) -> None:
    """Raise InputError for what cannot be a device here, as far as that shows without torch."""
    if not DEVICE.fullmatch(device):
        raise InputError(f"{option} must be auto, cpu, mps or cuda:0, cuda:1, ..., got {device!r}")
    if not device.startswith("cuda"):
        return
    torch_version = _torch_version()
    if torch_version.endswith("+cpu"):
        raise InputError(
            f"{option} {device}: the installed torch ({torch_version}) has no CUDA; use cpu or auto"
        )
    there = count_gpus()
    if int(device.partition(":")[2] or 0) >= there:
        known = ", ".join(f"cuda:{i}" for i in range(there)) or "none"
        raise InputError(f"{option} {device} is not here; GPUs: {known}; use one, cpu or auto")


def _int_or_none(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _str_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
