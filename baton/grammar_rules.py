"""Grammar rules: a client's rules (Lark's notation or GBNF) are checked before llguidance reads them.

llguidance parses Lark by recursion, and compiles what its directives hold past the limits of grammar.py.
So the text is split here exactly as the library splits it: a bracket or a directive counts unless it
stands in a comment, a string, a regex or a special token. What cannot be split, the library would refuse,
too. Each pattern reads a character once, and the first lexeme without an end ends the check: linear time.
"""

import re
from collections.abc import Iterator, Mapping

from llguidance.gbnf_to_lark import ASTNode, GrammarParser, RuleNode, RuleRefNode, resolve

from baton.errors import RequestError
from baton.json_schema import INVALID

DEEPEST_GROUP = 64
"""Brackets within brackets: the library's parser is recursive, and would crash."""

ROOT = "root"
"""The rule of GBNF with which a text begins; Lark's `start`, which is no terminal."""

_IS_LARK = re.compile(r"(?m)^[^\S\n]*(?:%llguidance\b|start\s*:)")
"""The library's own test, which takes the square of the time: its white space may span lines."""
_LARK = re.compile(
    r"""(?:\#|//)[^\n]*            # a comment
    | "(?:\\.|[^"\\\n])*"          # a string
    | /(?:\\.|[^/\\])+/            # a regex, which may span lines
    | <[^<>\s]+>                   # a special token
    | (?P<directive>%\s*(?:json|lark|regex|llguidance))
    | (?P<open>[(\[{]) | (?P<close>[)\]}])
    | (?P<endless>["/])
    | [^"/\#<%()\[\]{}]+ | .""",
    re.VERBOSE,
)
_GBNF = re.compile(
    r"""\#[^\r\n]*                 # a comment
    | "(?:\\[\s\S]|[^"\\])*"       # a string
    | \[(?:\\[\s\S]|[^\]\\])*\]    # a class of characters
    | (?P<directive>%\s*(?:json|lark|regex|llguidance))
    | (?P<open>[({]) | (?P<close>[)}])
    | (?P<endless>["\[])
    | [^"\#%()\[{}]+ | .""",
    re.VERBOSE,
)
_NAMES = {'"': "string", "/": "regex", "[": "class of characters"}


def check_rules(rules: str) -> None:
    """Raises RequestError for a directive, for brackets that are nested too deeply, and for a string,
    regex or class of characters without its end."""
    depth = 0
    for kind, text in _lexemes(rules):
        if kind == "directive":
            name = text.lstrip("%").strip()
            message = f"%{name} is not supported: give a schema or a regex by its own field"
            raise _invalid(f"the grammar's {message}")
        if kind == "endless":
            raise _invalid(f"the grammar has a {_NAMES[text]} that does not end")
        # never below 0: a closing bracket too many must not make room for opening ones
        depth = max(0, depth + (kind == "open") - (kind == "close"))
        if depth > DEEPEST_GROUP:
            raise _invalid(f"the grammar nests more than {DEEPEST_GROUP} brackets")


def as_lark(rules: str) -> str:
    """The rules in Lark's notation. Raises ValueError if they are neither."""
    if _is_lark(rules):
        return rules
    try:
        found = GrammarParser().parse(rules)
        _mark_terminals(found)
        resolve(found)
    except Exception as error:  # the library raises plain ones
        raise ValueError(f"Failed to convert the grammar from GBNF to Lark: {error}") from error
    ordered = sorted(found.values(), key=lambda rule: rule.order)
    return "\n".join(["%llguidance {}\n", *map(str, ordered), ""])


def _mark_terminals(rules: Mapping[str, RuleNode]) -> None:
    """Mark the rules that refer to terminals alone, each once. The library looks for them, too: at all
    rules again after each find, which for a chain of rules is the square of the time."""
    wanted = {name: _references(rule) for name, rule in rules.items() if name != ROOT}
    users: dict[str, list[str]] = {}
    for name, references in wanted.items():
        for reference in references:
            users.setdefault(reference, []).append(name)
    ready = [name for name, references in wanted.items() if not references]
    while ready:
        name = ready.pop()
        rules[name].rule_is_terminal = True
        for user in users.get(name, ()):
            wanted[user].discard(name)
            if not wanted[user]:
                ready.append(user)


def _references(rule: RuleNode) -> set[str]:
    """The names of the rules that this one refers to."""
    found, waiting = set[str](), list[ASTNode](rule.children())
    while waiting:
        node = waiting.pop()
        if isinstance(node, RuleRefNode):
            found.add(node.name)
        waiting += node.children()
    return found


def _is_lark(rules: str) -> bool:
    return _IS_LARK.search(rules) is not None


def _lexemes(rules: str) -> Iterator[tuple[str, str]]:
    """What counts: directives, brackets, and where something has no end."""
    for found in (_LARK if _is_lark(rules) else _GBNF).finditer(rules):
        if found.lastgroup is not None:
            yield found.lastgroup, found[0]


def _invalid(message: str) -> RequestError:
    return RequestError(message, code=INVALID)
