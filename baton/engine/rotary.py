"""Rotary embeddings whose frequencies depend on the length of the sequence, in a batch of sequences.

transformers takes the largest position of a forward as its length, and some of its modules keep state
from one forward to the next. Here one forward holds tokens of many sequences, so the modules' `forward`
is replaced: it calls transformers' code once for each rope length (baton/rope.py) in the batch, each
time in a module that is as new. A call for tokens of rope length L also has the position L - 1, whose
result is dropped.

    rope lengths   0  0  70  70  71  0          0: up to the first limit
    calls          tokens 0, 1, 5;  tokens 2, 3 and position 69;  token 4 (its position is 70)
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from baton.errors import ModelError
from baton.kv.row import Row
from baton.model_files import ModelFiles
from baton.rope import RECOMPUTING, RopeRule

KEY = "baton_rotary"
VARYING = "its rotary embedding depends on the length of the sequence"
"""Why such a model is not compiled, and its steps are not recorded."""


class Rotary:
    """The rotary modules of one PreTrainedModel. It holds no state of sequences."""

    def __init__(self, rule: RopeRule, modules: Sequence[torch.nn.Module]) -> None:
        self.rule = rule
        self.modules = [_Module(module, self) for module in modules]
        self._lengths: Sequence[int] | None = None  # of the running forward's tokens
        self._alone = False

    @classmethod
    def of(cls, model: Any) -> "Rotary | None":
        """The model's, installed by the first call. None: its frequencies never change. ModelError if
        they do in a way that is not known here."""
        if KEY in model.__dict__:
            found: Rotary | None = model.__dict__[KEY]
            return found
        modules = varying(model)
        rotary = cls(_rule(model, modules), modules) if modules else None
        model.__dict__[KEY] = rotary
        return rotary

    @contextmanager
    def rotating(self, rows: Sequence[Row]) -> Iterator[None]:
        """For one forward over these packed rows."""
        self._lengths = [
            length
            for row in rows
            for length in self.rule.lengths(row.rope_floor, row.start, row.end)
        ]
        try:
            yield
        finally:
            self._lengths = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For forwards of one sequence, exactly as in a new model of transformers, state included."""
        for each in self.modules:
            each.renew()
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def named(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Every module, for every kind of layer that it has frequencies of its own for ("": for all)."""
        for each in self.modules:
            for layers in _kinds(each.module):
                yield layers, each.module

    def lengths(self, positions: torch.Tensor) -> Sequence[int] | None:
        """The effective rope length of each token of the running forward; None in alone()."""
        if self._alone:
            return None
        if self._lengths is None:  # one sequence in one forward, such as a probe
            whole = self.rule.effective(int(positions.max()) + 1)
            return [whole] * positions.shape[-1]
        return self._lengths


class _Module:
    """One rotary module, its `forward` replaced."""

    def __init__(self, module: torch.nn.Module, rotary: Rotary) -> None:
        config = module.config
        self.module = module
        self._rotary = rotary
        self._original = copy.deepcopy(module, {id(config): config})
        self._attributes = dict(self._original.__dict__)
        self._buffers = dict(self._original._buffers)
        module.forward = self.forward

    def renew(self) -> None:
        """As after the construction of the model."""
        state = self._original.__dict__
        state.clear()
        state.update(self._attributes)
        state["_buffers"] = {
            name: None if buffer is None else buffer.clone()
            for name, buffer in self._buffers.items()
        }
        state["_non_persistent_buffers_set"] = set(self._attributes["_non_persistent_buffers_set"])

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **named: Any) -> Any:
        """See the top. Positions [..., T] -> what the module returns: tensors [..., T, dim]."""
        lengths = self._rotary.lengths(position_ids)
        if lengths is None:
            return self._original(x, position_ids, *args, **named)
        assert len(lengths) == position_ids.shape[-1]
        groups: dict[int, list[int]] = {}
        for token, length in enumerate(lengths):
            groups.setdefault(length, []).append(token)
        if len(groups) == 1:
            return self._rotated(lengths[0], x, position_ids, *args, **named)
        order = torch.tensor([token for group in groups.values() for token in group])
        back = order.argsort().to(position_ids.device)
        order = order.to(position_ids.device)
        results = []
        for length, tokens in zip(
            groups, order.split([len(group) for group in groups.values()]), strict=True
        ):
            chosen = position_ids.index_select(-1, tokens)
            results.append(self._rotated(length, x, chosen, *args, **named))
        if isinstance(results[0], torch.Tensor):
            return torch.cat(results, dim=-2).index_select(-2, back)
        return tuple(
            torch.cat(parts, dim=-2).index_select(-2, back) for parts in zip(*results, strict=True)
        )

    def _rotated(
        self, length: int, x: torch.Tensor, positions: torch.Tensor, *args: Any, **named: Any
    ) -> Any:
        """Positions of tokens that have one rope length."""
        self.renew()
        if not length:
            return self._original(x, positions, *args, **named)
        last = positions.new_full((*positions.shape[:-1], 1), length - 1)
        found = self._original(x, torch.cat([positions, last], dim=-1), *args, **named)
        if isinstance(found, torch.Tensor):
            return found[..., :-1, :]
        return tuple(each[..., :-1, :] for each in found)


def check_rope(files: ModelFiles, model: Any) -> None:
    """ModelError if the router and the workers, which read config.json by themselves, have another rule
    for the model than transformers."""
    rotary = Rotary.of(model)
    if rotary is not None and rotary.rule != files.rope:
        raise ModelError(
            f"{files.name} cannot be served: by its config.json the rotary frequencies change beyond "
            f"{_told(files.rope)}, for transformers beyond {_told(rotary.rule)}; write "
            "max_position_embeddings and, for longrope, original_max_position_embeddings into it"
        )


def _told(rule: RopeRule) -> str:
    return " and ".join(f"{limit:,} tokens" for limit in rule.limits) or "no length"


def varying(model: Any) -> list[torch.nn.Module]:
    """The model's rotary modules whose frequencies depend on the length."""
    return [module for module in model.modules() if _kinds(module)]


def _kinds(module: torch.nn.Module) -> dict[str, str]:
    """The rope types of a module that depend on the length, by kind of layer ("": of all)."""
    given = getattr(module, "rope_type", None)
    named = given if isinstance(given, dict) else {"": given}
    return {
        str(layers): kind
        for layers, kind in named.items()
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
    }


def _rule(model: Any, modules: Sequence[Any]) -> RopeRule:
    """The rule of the model's config. ModelError if its modules follow another one."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    rule = RopeRule.of(config.to_dict(), int(config.max_position_embeddings))
    limits = set()
    for module in modules:
        for layers, kind in _kinds(module).items():
            parameters = module.config.rope_parameters
            parameters = parameters[layers] if layers else parameters
            switch = parameters.get("original_max_position_embeddings")
            limits.add(int(module.original_max_seq_len if "dynamic" in kind else switch))
    if limits != set(rule.limits):
        raise ModelError(
            f"{name} cannot be served: its rotary embedding changes at lengths of {sorted(limits)}, "
            f"its config.json says {list(rule.limits)}"
        )
    own = type(model).prepare_inputs_for_generation.__qualname__
    if not own.startswith("GenerationMixin.") and config.model_type not in RECOMPUTING:
        raise ModelError(
            f"{name} cannot be served: its rotary embedding depends on the length of a sequence, and "
            "transformers generates with it in a way of its own"
        )
    return rule
