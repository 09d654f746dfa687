"""The architecture, read off the code: who imports whom, what is heavy, what is never written here."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]

# Top first. A module imports lower rows only, never its row's neighbours; a package may import
# within itself. Rooms that are still to come stand where they will be.
ROWS = (
    ("main", "server", "setup"),
    ("tools.lab", "tools.evaluation", "tools.benchmarks", "tools.faults"),
    ("tools.measure", "tools.training", "tools.site"),
    ("baton.cli",),
    ("baton", "tools"),  # the door: `from baton import LLM, generate`, and nothing else
    ("baton.api",),
    ("baton.llm",),
    ("baton.llm_tools", "baton.llm_params"),
    ("baton.local", "baton.offline", "baton.plan", "baton.server", "baton.models"),
    ("router", "prefill_worker", "decode_worker", "baton.backend"),
    ("baton.parallel",),
    ("baton.cluster",),
    ("baton.client", "baton.engine", "baton.transfer"),
    ("baton.wire",),
    ("baton.trace", "baton.text"),
    ("baton.params", "baton.machine", "baton.timeline", "baton.verdict"),
    (
        "baton.kv", "baton.grammar", "baton.model_files", "baton.topology", "baton.host",
        "baton.lifecycle", "baton.log", "baton.timing", "baton.config", "baton.dtypes",
        "baton.health", "baton.table", "baton.pace", "baton.pulse", "prompts",
    ),
    ("baton.grammar_rules", "baton.tool_calls"),
    ("baton.tool_calls_marked", "baton.tool_calls_channels"),
    ("baton.gguf", "baton.quantized", "baton.model_packages", "baton.json_schema", "baton.adapters"),
    ("baton.checkpoints",),
    ("baton.cache",),
    (
        "baton.errors", "baton.bounds", "baton.clock", "baton.failpoint", "baton.package",
        "baton.finite", "baton.memory", "baton.rope", "sampler",
    ),
)  # fmt: skip

TORCH_ZONE = (
    "baton.engine", "baton.parallel", "baton.transfer", "sampler.sample", "sampler.narrow",
    "sampler.filters", "sampler.logprobs", "sampler.race", "sampler.shape", "sampler.copies",
    "sampler.step",
    "prefill_worker.filling", "prefill_worker.pooled", "prefill_worker.process",
    "prefill_worker.own_pool", "prefill_worker.resend", "prefill_worker.ways",
    "decode_worker.decoding", "decode_worker.draft", "decode_worker.process", "baton.local",
    "baton.models", "baton.gguf.weights", "baton.quantized.numbers", "baton.quantized.weights", "tools",
)  # fmt: skip
HEAVY = ("torch", "transformers")
BEHIND_THE_DOOR = {  # the heavy half is imported once the options are right, or it is needed
    "prefill_worker.__main__": ("prefill_worker.process",),
    "decode_worker.__main__": ("decode_worker.process",),
    "baton.cli.main": ("baton.models.convert", "baton.models.quantize"),
    "baton.llm": ("baton.local",),
    "setup": ("baton.engine.cpu.ship",),  # which imports no torch: it compiles for a wheel
}

STARTS_FAST = (
    "prefill_worker.process", "decode_worker.process", "baton.local", "baton.engine.cpu.select",
)  # fmt: skip
"""What a worker imports whose program is stored. Importing transformers takes longer than all the rest of
its start, so whatever needs it is imported when a model is loaded or divided."""

LONGEST_FILE = 500
LONGEST_FUNCTION = 65  # about 60: a list of command-line options may run on

NEVER_IMPORTED = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NEVER_CALLED = {"recv_pyobj", "send_pyobj"}
COPY_THEIR_OWN = {ROOT / f"tests/pure/{name}.py" for name in ("explore", "worlds")}
"""They copy nodes in memory, some 100,000 times a run, and read no file and no socket."""
BROAD = {"baton/wire/loop.py", "baton/wire/codec.py", "baton/checkpoints/added_tokens.py",
         "baton/models/convert.py", "baton/gguf/folder.py", "baton/backend.py",
         "baton/engine/boot.py", "baton/engine/cpu/compile.py", "tools/faults/__main__.py",
         "baton/grammar_rules.py", "baton/server/websocket.py",
         "baton/parallel/runner.py", "baton/engine/lora/shelf.py"}  # fmt: skip
"""STYLE's three, four where a library raises bare Exception, the LLM's thread, two that run the code of
any architecture, the first rank of several, for which others wait in the forward, what reads adapters
that clients name, the fault battery, and what answers a WebSocket, as the framework does for HTTP; each
turns it into ours or an answer, raises it where it is waited for, or reports a failed row."""
SPEAKERS = ("baton/cli/", "baton/offline/", "tools/", "baton/server/__main__.py",
            "baton/server/serve.py", "baton/parallel/team.py", "baton/cluster/launch.py",
            "baton/wire/loop.py", "baton/models/convert.py")  # fmt: skip

CALENDAR = {
    "baton/cache.py": "when files and folders of the cache were used",
    "baton/cli/cache.py": "how long ago that was",
    "baton/failpoint.py": "against a file's modification time",
    "baton/log.py": "lines of logs",
    "baton/server/otel.py": "spans carry it",
    "baton/server/responses/routes.py": "`created_at` of OpenAI's responses",
    "baton/server/service.py": "`created` of OpenAI's objects",
    "baton/server/templates_sandbox.py": "`strftime_now` of chat templates",
    "baton/transfer/frames.py": "against a file's modification time",
}
"""Who reads the calendar, and what for. Everything else is monotonic: a clock that is set, or jumps, ends
no wait and no request."""


def python_files() -> list[Path]:
    """Every Python file of ours, product and tests. Environments, with thousands, are not walked."""
    hidden, found = {"build", "dist", "node_modules", "__pycache__"}, list[Path]()
    for folder, names, files in os.walk(ROOT):
        names[:] = [each for each in names if not each.startswith(".") and each not in hidden]
        found += [Path(folder, each) for each in files if each.endswith(".py")]
    return sorted(each for each in found if not each.name.startswith("."))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PRODUCT = [
    p for p in python_files() if not relative(p).startswith(("tests/", "debug/", "examples/"))
]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_name(path): path for path in PRODUCT}


@cache
def imports(path: Path) -> tuple[tuple[str, int], ...]:
    """Every module this file imports, wherever the import stands, and its line."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((each.name, node.lineno) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute"
            assert node.module is not None
            for each in node.names:
                whole = f"{node.module}.{each.name}"
                yield (whole if whole in MODULES else node.module), node.lineno


def row_of(module: str) -> tuple[int, str] | None:
    """The row a module stands in, and under which name; None if it is not ours."""
    best = max(
        ((len(unit), index, unit) for index, row in enumerate(ROWS) for unit in row
         if module == unit or (module.startswith(unit + ".") and unit not in ("baton", "tools"))),
        default=None,
    )  # fmt: skip
    return None if best is None else best[1:]


def is_in(module: str, zone: tuple[str, ...]) -> bool:
    return any(module == each or module.startswith(each + ".") for each in zone)


def offenders(found: list[str]) -> None:
    assert not found, "\n".join(found)


def test_every_module_stands_in_the_table() -> None:
    offenders([f"{name} stands in no row" for name in MODULES if row_of(name) is None])


def test_a_module_imports_lower_rows_only() -> None:
    found = []
    for name, path in MODULES.items():
        here = row_of(name)
        for target, line in imports(path):
            there = row_of(target)
            if here is None or there is None or here[1] == there[1]:
                continue
            if there[0] <= here[0]:
                found.append(f"{relative(path)}:{line}: {here[1]} imports {target}")
    offenders(found)


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: {t for t, _ in imports(path) if t in MODULES} for name, path in MODULES.items()}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*way, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


def test_torch_is_imported_in_its_zone_only() -> None:
    offenders(
        [
            f"{relative(path)}:{line}: {name} imports {target}"
            for name, path in MODULES.items()
            for target, line in imports(path)
            if is_in(target, HEAVY) and not is_in(name, TORCH_ZONE)
        ]
    )


def test_nobody_outside_the_torch_zone_imports_into_it_but_through_the_door() -> None:
    found = []
    for name, path in MODULES.items():
        if is_in(name, TORCH_ZONE):
            continue
        at_the_top = {
            n.lineno for n in parsed(path).body if isinstance(n, ast.Import | ast.ImportFrom)
        }
        for target, line in imports(path):
            lazily = target in BEHIND_THE_DOOR.get(name, ()) and line not in at_the_top
            if is_in(target, TORCH_ZONE) and not lazily:
                found.append(f"{relative(path)}:{line}: {name} imports {target}")
    offenders(found)


def imported_with(module: str) -> Iterator[tuple[str, ...]]:
    """Every module that importing this one imports, as the way to it; what stands in functions is not."""
    seen, ways = {module}, [(module,)]
    while ways:
        way = ways.pop()
        yield way
        path = MODULES.get(way[-1])
        waiting: list[ast.AST] = [] if path is None else [parsed(path)]
        lines = set[int]()
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Import | ast.ImportFrom):
                lines.add(node.lineno)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                waiting += ast.iter_child_nodes(node)
        for target, line in imports(path) if path is not None else ():
            if line in lines and target not in seen:
                seen.add(target)
                ways.append((*way, target))


@pytest.mark.parametrize("module", STARTS_FAST)
def test_a_worker_whose_program_is_stored_does_not_import_transformers(module: str) -> None:
    ways = list(imported_with(module))
    assert len(ways) > 20
    offenders([" -> ".join(way) for way in ways if is_in(way[-1], ("transformers",))])


@pytest.mark.parametrize(
    "command", [["-m", "router"], ["-m", "prefill_worker"], ["-m", "decode_worker"], ["main.py"]]
)
def test_help_answers_without_torch(command: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines()}
    assert "Usage" in ran.stdout
    assert "click" in loaded
    assert not loaded & {*HEAVY, "numpy", "safetensors"}


def sized_files() -> list[object]:
    return [pytest.param(path, id=relative(path)) for path in PRODUCT]


@pytest.mark.parametrize("path", sized_files())
def test_a_file_is_short_and_says_first_what_it_is(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{relative(path)} has {lines} lines"
    assert ast.get_docstring(parsed(path)), f"{relative(path)} does not say what it is"


def test_a_function_fits_on_a_screen() -> None:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    offenders(
        [
            f"{relative(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            for path in PRODUCT
            for node in ast.walk(parsed(path))
            if isinstance(node, functions)
            and node.end_lineno is not None
            and node.end_lineno - node.lineno >= LONGEST_FUNCTION
        ]
    )


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def dangers(path: Path) -> Iterator[tuple[int, str]]:
    """What must not stand in any file, tests included."""
    for target, line in imports(path):
        if target.partition(".")[0] in NEVER_IMPORTED:
            if path not in COPY_THEIR_OWN:
                yield line, f"import {target}"
        elif target == "multiprocessing.shared_memory":
            yield line, f"import {target}"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "multiprocessing":
            if any(each.name == "shared_memory" for each in node.names):
                yield node.lineno, "multiprocessing.shared_memory"
        elif isinstance(node, ast.Attribute) and node.attr in NEVER_CALLED:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield node.lineno, name
            if name == "torch.load" and relative(path) != "baton/models/convert.py":
                yield node.lineno, name
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "allow_pickle" and getattr(value, "value", None) is not False:
                    yield node.lineno, "allow_pickle"
                if keyword.arg == "weights_only" and getattr(value, "value", None) is not True:
                    yield node.lineno, "weights_only is not True"


def test_nothing_in_the_tree_can_run_what_it_reads() -> None:
    offenders(
        [
            f"{relative(path)}:{line}: {what}"
            for path in python_files()
            for line, what in dangers(path)
        ]
    )


def test_the_look_for_dangers_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nfrom multiprocessing import shared_memory\n"
        "def f(s, x):\n    import marshal\n    s.recv_pyobj()\n    eval(x)\n    yaml.load(x)\n"
        "    torch.load(x, weights_only=False)\n    np.load(x, allow_pickle=True)\n    m.eval()\n"
    )
    assert sorted(what for _, what in dangers(bad)) == sorted(
        ["import pickle", "multiprocessing.shared_memory", "import marshal", "recv_pyobj", "eval",
         "yaml.load", "torch.load", "weights_only is not True", "allow_pickle"]
    )  # fmt: skip


def test_exceptions_are_caught_by_name() -> None:
    found = []
    for path in PRODUCT:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            name = "BaseException" if node.type is None else dotted(node.type)
            last = node.body[-1]
            passes_on = isinstance(last, ast.Raise) and last.exc is None
            if name == "BaseException" and not passes_on:
                found.append(f"{relative(path)}:{node.lineno}: catches everything and keeps it")
            if name == "Exception" and relative(path) not in BROAD:
                found.append(f"{relative(path)}:{node.lineno}: except Exception")
    offenders(found)


def test_no_wait_and_no_deadline_reads_the_calendar() -> None:
    names = {"time.time", "time.time_ns", "datetime.now", "datetime.today", "datetime.utcnow"}
    found = {
        relative(path)
        for path in PRODUCT
        if not relative(path).startswith("tools/")
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in names)
        or (
            isinstance(node, ast.ImportFrom)
            and any(f"{node.module}.{each.name}" in names for each in node.names)
        )
    }
    assert found <= set(CALENDAR), f"{sorted(found - set(CALENDAR))} read the calendar"


def test_only_commands_print() -> None:
    offenders(
        [
            f"{relative(path)}:{node.lineno}: print"
            for path in PRODUCT
            if not relative(path).startswith(SPEAKERS)
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Call) and dotted(node.func) == "print"
        ]
    )


def test_imports_are_not_hidden_from_the_reader() -> None:
    """No TYPE_CHECKING (it hides cycles) and no star."""
    found = []
    for path in PRODUCT:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Name) and node.id == "TYPE_CHECKING":
                found.append(f"{relative(path)}:{node.lineno}: TYPE_CHECKING")
            if isinstance(node, ast.ImportFrom) and any(each.name == "*" for each in node.names):
                found.append(f"{relative(path)}:{node.lineno}: import *")
    offenders(found)


def test_every_message_is_in_the_union() -> None:
    from baton.wire import adapter_messages, client_messages, local_messages, messages

    kinds = {kind.__name__ for kind in get_args(messages.Message)}
    defined = {
        node.name
        for module in (messages, client_messages, adapter_messages, local_messages)
        for node in parsed(Path(str(module.__file__))).body
        if isinstance(node, ast.ClassDef)
    }
    assert defined - {"RunTokens", "NotHeld"} == kinds  # these travel inside others
