"""The commands as their --help shows them, read without a subprocess and without knowing where a command
lives: --help is run, and click is asked which command it was about to describe."""

import runpy
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import click
import pytest

# ---- the only import of ours: the program itself
from baton.cli import main as program


def shown(monkeypatch: pytest.MonkeyPatch, command: str) -> dict[str, Any]:
    """What `command --help` offers. `command` is "python main.py ..." or "python -m ..."."""
    seen: list[click.Context] = []

    def note(_: click.Command, ctx: click.Context) -> str:
        seen.append(ctx)
        return ""

    monkeypatch.setattr(click.Command, "get_help", note)
    monkeypatch.setattr(program, "turned_into_exceptions", nullcontext)  # no signal handlers here
    _, kind, *words = command.split()
    if kind == "main.py":
        assert program.main([*words, "--help"]) == 0
    else:
        module, *rest = words
        monkeypatch.setattr(sys, "argv", [module, *rest, "--help"])
        # runpy warns about a module that another test has imported
        monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)
        with pytest.raises(SystemExit) as left:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        assert not left.value.code
    (ctx,) = seen
    return _described(ctx)


def _described(ctx: click.Context) -> dict[str, Any]:
    """Everything but the prose."""
    command = ctx.command
    found: dict[str, Any] = {}
    for param in command.params:
        if isinstance(param, click.Option):
            if not param.hidden:
                found[" / ".join([*param.opts, *param.secondary_opts])] = _option(param, ctx)
        else:
            found[param.make_metavar(ctx)] = {"argument": True} | _param(param)
    # Not get_params(): click keeps the help option of the first context that asked a command for it.
    found[" / ".join(ctx.help_option_names)] = {"flag": True, "type": "Bool"}
    if isinstance(command, click.Group):
        found["commands"] = sorted(
            name for name, each in command.commands.items() if not each.hidden
        )
    return found


def _option(option: click.Option, ctx: click.Context) -> dict[str, Any]:
    flag = {"flag": True} if option.is_flag else {"metavar": option.make_metavar(ctx)}
    return flag | _param(option)


def _param(param: click.Parameter) -> dict[str, Any]:
    """What is not as in most options is left out."""
    facts = param.to_info_dict()
    kind = {k: v for k, v in facts["type"].items() if k != "name" and v not in (None, False)}
    found: dict[str, Any] = {
        "type": kind.pop("param_type"),
        "limits": _plain(kind),
        "required": param.required,
        "multiple": param.multiple,
        "nargs": param.nargs if param.nargs != 1 else None,
        "default": _plain(facts["default"]),
    }
    return {key: value for key, value in found.items() if value not in (None, False, {}, ())}


def _plain(value: Any) -> Any:
    """As JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | None) else str(value)
