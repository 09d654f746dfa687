"""Devices and dtypes: selection, description, and free memory."""

import os
import platform
from pathlib import Path

import torch

from baton.dtypes import INT8, KV_DTYPES
from baton.errors import InputError
from baton.host import available_memory, core_numbers, meminfo, run_on

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8_CAPABILITY = (8, 9)


def pick_device(name: str) -> torch.device:
    """The device called `name`; InputError if it does not exist. "auto" is a GPU (cuda, also for ROCm),
    else the CPU: no transport moves KV out of an Apple GPU, so no worker can use one."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if gpus else "cpu")
    available = ["cpu", *(["mps"] if _has_mps() else []), *(f"cuda:{i}" for i in range(gpus))]
    found = "cuda:0" if name == "cuda" else name
    if found not in available:
        raise InputError(
            f"there is no device {name!r} here: use auto or one of {', '.join(available)}"
        )
    return torch.device(found)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; InputError if it is unknown. "auto" is bf16 on a GPU (fp16 if it does
    not support bf16) and fp32 on the CPU and on mps."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if bf16 else torch.float16
    if name not in DTYPES:
        raise InputError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def pick_kv_dtype(name: str, computed: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the KV cache for a value of --kv-cache-dtype; InputError for one that does not run
    here. `computed`: that of the computation."""
    if name == "auto":
        return computed
    if name != INT8:
        raise InputError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {name!r}")
    if device.type != "cpu":
        raise InputError(
            f"--kv-cache-dtype int8 needs a CPU, got {device}: attention on GPUs does not read it yet; "
            "leave it out"
        )
    return torch.int8


def set_up(device: torch.device) -> None:
    """Settings of torch for this device, before the first forward. cuDNN's attention is torch's first
    choice on Hopper from 2.11 on. It makes a plan of 20 to 40 ms for each exact shape and keeps all of
    them; here every length is another shape. With few KV heads it may also be wrong (pytorch#193893)."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def refuse_without_fp8(device: torch.device) -> None:
    """InputError if the device does not support FP8 matrix products."""
    found = "has none"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= FP8_CAPABILITY:
            return
        found = f"has {major}.{minor}"
    raise InputError(
        "fp8 weights need a GPU of compute capability 8.9 or more (Ada, Hopper, later), and "
        f"{describe_device(device)} {found}: use another dtype"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name in KVLayout and in messages: torch.float32 is "float32"."""
    return str(dtype).removeprefix("torch.")


def describe_device(device: torch.device) -> str:
    """Name and memory, for people."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
    name = _cpu_name() if device.type == "cpu" else "Apple GPU"
    memory = f", {total_memory() / 2**30:.1f} GiB" if total_memory() else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return name + threads + memory


class CoreTaker:
    """Moves this process to given cores, among those it was allowed to use when it started."""

    def __init__(self) -> None:
        self._allowed = core_numbers()

    def use(self, cores: tuple[int, ...]) -> None:
        """Use these cores from the next forward on. Ignored if none of them is allowed."""
        mine = tuple(core for core in dict.fromkeys(cores) if core in self._allowed)
        if mine:
            run_on(mine)
            torch.set_num_threads(len(mine))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = available_memory()
    return total_memory() // 2 if available is None else available


def allocated(device: torch.device) -> int:
    """Bytes of a GPU that this process's tensors hold now; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def total_memory() -> int:
    """Bytes of main memory, 0 if the system does not report it."""
    total = meminfo("MemTotal")
    if total is not None:
        return total
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _cpu_name() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
