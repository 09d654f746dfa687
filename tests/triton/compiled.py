"""Compiles every launch of a forward for GPUs that are not here, and says what each kernel needs.

    .venv-triton/bin/python -m tests.triton.compiled --arch 90 --shape qwen2-7b

Triton's wheel brings ptxas, so the machine code for a card is made without the card: whether it
compiles, whether registers spill to memory, how much shared memory a program needs, and which matrix
instructions it uses. Only time is not known. Not under TRITON_INTERPRET: then nothing is compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.engine.attention import AttentionParams
from baton.engine.batch import pack
from baton.engine.cuda import triton_kernels
from baton.engine.cuda.triton_attention import TritonAttention, tuned
from baton.engine.pool import Pool
from baton.kv.layout import KVLayout, LayerShape
from baton.kv.row import Row

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB of a program at most, by architecture

PLAIN = AttentionParams(0.125)
PECULIAR = AttentionParams(0.125, window=1024, softcap=50.0, sinks=torch.zeros(1))
SHAPES: dict[str, tuple[int, LayerShape, str, AttentionParams]] = {
    "gpt2": (12, LayerShape(12, 64, 64), "float16", PLAIN),
    "qwen2-0.5b": (14, LayerShape(2, 64, 64), "bfloat16", PLAIN),
    "qwen2-7b": (28, LayerShape(4, 128, 128), "bfloat16", PLAIN),
    "gpt-oss": (64, LayerShape(8, 64, 64), "bfloat16", PECULIAR),
    "gemma2": (8, LayerShape(4, 256, 256), "bfloat16", PECULIAR),
    "phi3": (32, LayerShape(32, 96, 96), "bfloat16", PLAIN),
    "deepseek": (16, LayerShape(16, 192, 128), "bfloat16", PLAIN),
    "heads of 512": (8, LayerShape(2, 512, 512), "bfloat16", PLAIN),
    "float32": (14, LayerShape(2, 128, 128), "float32", PECULIAR),
}


@dataclass(frozen=True, slots=True)
class Made:
    """A kernel for one GPU."""

    name: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread's local memory
    shared: int  # bytes of a program
    matrix: tuple[str, ...]  # its kinds of matrix instructions


class Noted:
    """In place of a kernel: notes the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **named: self.launches.append((given, named))


def make(kernel: Any, given: tuple[Any, ...], named: dict[str, Any], arch: int) -> Made:
    """The kernel of this launch, compiled as the launch itself would."""
    options = {name: named[name] for name in OPTIONS if name in named}
    constants = {name: each for name, each in named.items() if name not in options}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, (name, each) in enumerate(zip(kernel.arg_names, given, strict=False)):
        if isinstance(each, torch.Tensor):
            signature[name] = TYPES[each.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(each, float) else "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])

        def said(tool: str, *options: str) -> str:
            command = [str(TOOLS / tool), *options, str(binary)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = said("cuobjdump", "--dump-resource-usage")
        matrix = set(re.findall(r"\b(HGMMA|HMMA|DMMA|IMMA)\.(\w+)", said("nvdisasm", "-c")))
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    local = int(numbers["STACK"]) + int(numbers.get("LOCAL", 0))
    return Made(
        *(kernel.__name__, int(numbers["REG"]), local, made.metadata.shared),
        tuple(sorted(".".join(each) for each in matrix)),
    )


def all_made(shape: str, arch: int) -> Iterator[tuple[str, Made]]:
    """The kernels of a decode step, of a short one whose keys need no splits, and of a mixed batch."""
    heads, layer, dtype, params = SHAPES[shape]
    page, cpu = 16, torch.device("cpu")
    pool = Pool.private(KVLayout((layer,), page, dtype), 256, cpu)
    table = list(range(256))
    cases = {
        "decode": [Row([0], 4000, table)],
        "short": [Row([0], 60, table)],
        "mixed": [Row([0] * 3, 4000, table), Row([0] * 64, 0, table)],
    }
    for case, rows in cases.items():
        kernels: Any = ModuleType("noted")
        kernels.attend, kernels.reduce = Noted(triton_kernels.attend), Noted(triton_kernels.reduce)
        batch = pack(rows, page, cpu)
        query = torch.zeros(len(batch.slots), heads, layer.key_dim, dtype=pool.keys[0].dtype)
        TritonAttention(batch, page, tuned(divmod(arch, 10)), kernels)(query, pool, 0, params)
        for each in (kernels.attend, kernels.reduce):
            for given, named in each.launches:
                yield case, make(each.kernel, given, named, arch)


@click.command()
@click.option("--arch", "archs", multiple=True, type=click.Choice([*SHARED]), default=[90])
@click.option("--shape", "shapes", multiple=True, type=click.Choice([*SHAPES]), default=[*SHAPES])
def main(archs: tuple[int, ...], shapes: tuple[str, ...]) -> None:
    """Compile and print one line for each kernel."""
    for arch in archs:
        for shape in shapes:
            for case, made in all_made(shape, arch):
                print(
                    f"sm_{arch} {shape:<13}{case:<7}{made.name:<7}{made.registers:>4} registers"
                    f"{made.spilled:>5} B spilled{made.shared:>8} B shared of "
                    f"{SHARED[arch]} KiB  {' '.join(made.matrix)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
