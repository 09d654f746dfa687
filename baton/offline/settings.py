"""Settings of the offline job: the command line, checked as far as possible without the model.

What needs the model's files is checked in length_checks.py and run.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from baton.cluster.options import DECLARED, ClusterOptions, flag
from baton.errors import InputError
from baton.offline.outputs import check_apart
from baton.package import COMMAND, ROOT
from baton.params import MAX_STOP_CHARACTERS, MAX_STOPS
from baton.topology import Topology, count_gpus, plan_topology
from sampler.params import SamplingParams

OWN_PROMPTS = ROOT / "prompts.py"
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
ONLY_WHEN_SAMPLING = ("top_k", "top_p", "min_p")
OWN_CLUSTER_ONLY = (
    *("model", "download", "prefill_device", "decode_device", "num_prefill", "num_decode"),
    *("colocated", *(each.name for each in DECLARED)),
)
"""Options that make no sense with --router: the running cluster has its own."""

IsExplicit = Callable[[str], bool]
"""Whether the user wrote this option, as against its default."""


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A running cluster that this job did not start."""

    router: str
    keys: Path | None


@dataclass(frozen=True, slots=True)
class OwnCluster:
    """A cluster to start for the job. `download`: fetch the model if it is not on disk."""

    options: ClusterOptions
    download: bool


Target = OwnCluster | RunningCluster


@dataclass(frozen=True, slots=True)
class JobSettings:
    """One offline job. `sampling` holds the sampling options of the command line by name; None leaves
    a parameter to the model."""

    target: Target
    sampling: Mapping[str, Any]
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


def settings_from(given: Mapping[str, Any], is_explicit: IsExplicit) -> JobSettings:
    """`given` holds the value of every option. Raises InputError."""
    check_numbers(**{name: given[name] for name in ("batch_size", "generation_length", "stop")})
    if given["timings"] and given["format"] == "txt":
        raise InputError("--timings go into jsonl lines: add --format jsonl")
    refuse_updates(given)
    if len(given["lora"]) > 1:
        raise InputError(
            f"--lora is given {len(given['lora'])} times: a job runs all its prompts with one adapter; "
            f"`{COMMAND} run-batch` chooses one for each request"
        )
    output = Path(given["output_file"])
    trace = Path(given["trace_file"]) if given["trace_file"] else None
    check_apart(Path(given["prompts"] or OWN_PROMPTS), output, trace)
    copied = ("batch_size", "generation_length", "stop", "ignore_eos", "format", "timings", "quiet")
    return JobSettings(
        target=target_from(given, is_explicit, batch_size=given["batch_size"]),
        sampling={name: given[name] for name in (*SAMPLING_FLAGS, "seed", "greedy")},
        prompts=chosen_prompts(given["prompts"]),
        output=output,
        trace=trace,
        **{name: given[name] for name in copied},
    )


def target_from(given: Mapping[str, Any], is_explicit: IsExplicit, *, batch_size: int) -> Target:
    """`given` holds the value of every option. Raises InputError."""
    if given["router"] is not None:
        return _running_cluster(given, is_explicit)
    if given["keys"]:
        raise InputError("--keys is for a running cluster: add --router tcp://HOST:PORT")
    if given["colocated"]:
        for name in ("prefill_device", "num_prefill", "role_policy"):
            if is_explicit(name):
                raise InputError(
                    f"{flag(name)} and --colocated exclude each other: colocated decode workers "
                    "fill their own KV cache"
                )
    for name in ("num_prefill", "num_decode"):
        if given[name] < 1:
            raise InputError(f"{flag(name)} must be at least 1, got {given[name]}")
    declared = {each.name: given[each.name] for each in DECLARED}
    topology = _topology(given, is_explicit)
    options = ClusterOptions(given["model"], topology, batch_size, **declared)
    return OwnCluster(options, given["download"])


def options_for_ray(
    given: Mapping[str, Any], is_explicit: IsExplicit, *, batch_size: int
) -> ClusterOptions:
    """`given` holds the value of every option. Devices are auto, cpu or cuda: Ray chooses node and GPU.
    Raises InputError."""
    for name, why in (
        ("router", "a running cluster has its own workers"),
        ("keys", "the cluster makes its own keys"),
        ("download", "fetch the model on every node before"),
        ("spare_worker", "a spare cannot wait on every node"),
    ):
        if given[name]:
            raise InputError(f"{flag(name)} and --cluster ray exclude each other: {why}")
    colocated, devices = given["colocated"], dict[str, tuple[str, ...]]()
    for role in ("prefill", "decode"):
        count, named = given[f"num_{role}"], given[f"{role}_device"] or ("auto",)
        if colocated and role == "prefill":
            if is_explicit("num_prefill") or given["prefill_device"]:
                raise InputError("prefill workers and --colocated exclude each other")
            count = 0
        elif count < 1:
            raise InputError(f"--num-{role} must be at least 1, got {count}")
        for each in named:
            if each not in ("auto", "cpu", "cuda"):
                raise InputError(
                    f"--{role}-device {each}: with --cluster ray it is auto, cpu or cuda; Ray chooses "
                    "the GPU"
                )
        devices[role] = tuple(named[number % len(named)] for number in range(count))
    topology = Topology(devices["prefill"], devices["decode"], colocated)
    declared = {each.name: given[each.name] for each in DECLARED}
    return ClusterOptions(given["model"], topology, batch_size, **declared)


def refuse_lora(given: Mapping[str, Any]) -> None:
    """InputError for adapters where no request can name one."""
    refuse_updates(given)
    if given["lora"]:
        raise InputError(
            "--lora is for serve and run-batch, whose requests name an adapter as their model, and for "
            "jobs: leave it out here"
        )


def refuse_updates(given: Mapping[str, Any]) -> None:
    """InputError for adapters that come and go where nobody can ask for it."""
    if given["allow_lora_updates"] is not None:
        raise InputError("--allow-lora-updates is for serve: leave it out here")


def check_numbers(*, batch_size: int, generation_length: int, stop: tuple[str, ...]) -> None:
    """Raises InputError."""
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


def resolve_sampling(
    options: Mapping[str, Any], default: SamplingParams
) -> tuple[SamplingParams, str]:
    """The user's parameters over the model's own, and a notice about those that have no effect, or "".
    Raises InputError for values out of range."""
    if options["greedy"] and options["temperature"]:
        raise InputError(
            f"--greedy and --temperature {options['temperature']:g} exclude each other: "
            "leave one out"
        )
    given = {name: options[name] for name in SAMPLING_FLAGS if options[name] is not None}
    if options["greedy"]:
        given["temperature"] = 0.0
    try:
        params = replace(default, **given, seed=options["seed"])
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"{flag(name)} {rest}") from error
    idle = [flag(name) for name in ONLY_WHEN_SAMPLING if name in given] if params.greedy else []
    if not idle:
        return params, ""
    way_out = "" if "temperature" in given else "; --temperature turns sampling on"
    return params, f"{', '.join(idle)} has no effect: decoding is greedy{way_out}"


def chosen_prompts(file: str | None) -> tuple[str, ...]:
    """The prompts of `file`, or else of prompts.py. Raises InputError."""
    try:
        from prompts import PROMPTS, check_prompts, read_prompts
    except SyntaxError as error:
        raise InputError(
            f"prompts.py, line {error.lineno}: {error.msg}; every prompt stands in quotes with a "
            "comma behind it"
        ) from None
    return tuple(read_prompts(Path(file)) if file is not None else check_prompts(PROMPTS))


def _running_cluster(given: Mapping[str, Any], is_explicit: IsExplicit) -> RunningCluster:
    address = given["router"]
    if not re.fullmatch(r"tcp://.+:\d+|ipc://.+", address):
        raise InputError(
            f"--router must be tcp://HOST:PORT or ipc://PATH, as the router printed it, got {address!r}"
        )
    if address.startswith("tcp://") and not given["keys"]:
        raise InputError(
            f"--router {address} needs --keys DIR: tcp connections need CURVE keys; "
            f"`{COMMAND} keys DIR` makes them"
        )
    for name in OWN_CLUSTER_ONLY:
        if is_explicit(name):
            raise InputError(
                f"{flag(name)} is for a cluster that main.py starts itself; the one at {address} "
                "has its own: leave it out"
            )
    return RunningCluster(address, Path(given["keys"]) if given["keys"] else None)


def _topology(given: Mapping[str, Any], is_explicit: IsExplicit) -> Topology:
    return plan_topology(
        () if given["colocated"] else _named(given, is_explicit, "prefill"),
        _named(given, is_explicit, "decode"),
        prefills=given["num_prefill"],
        decodes=given["num_decode"],
        colocated=given["colocated"],
        gpus=usable_gpus(),
        ranks=given["tensor_parallel_size"],
        prefill_ranks=given["prefill_tensor_parallel_size"],
    )


def _named(given: Mapping[str, Any], is_explicit: IsExplicit, role: str) -> tuple[str, ...]:
    """One device per worker; workers take the given devices in turn. Empty for auto."""
    named, count = given[f"{role}_device"], given[f"num_{role}"]
    if len(named) > count and is_explicit(f"num_{role}"):
        raise InputError(
            f"--num-{role} {count} is less than the {len(named)} times --{role}-device was given"
        )
    for device in named:
        check_device(device, f"--{role}-device")
    if not named or set(named) == {"auto"}:
        return ()
    return tuple(named[i % len(named)] for i in range(max(count, len(named))))


def usable_gpus() -> int:
    """How many GPUs the installed torch can use, judged without importing it."""
    return 0 if _torch_version().endswith("+cpu") else count_gpus()


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        raise InputError("PyTorch is not installed here: run `make setup`") from None


def check_device(device: str, option: str) -> None:
    """Raise InputError for a device that this machine or the installed torch does not have."""
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
