"""Grammar: tables of templates read from text files, and the writer that turns them into prose.

A theme is two files, its templates and its frames, that hold sections. `@name` opens a rule, one
alternative per line. Five are special:

    @plan    stage names in order, one plan per line; `stage?` is left out half of the time
    @let     `P = name`: a variable of the document, drawn from a rule when first mentioned
    @frame   records of `key = value` lines between blank lines: one record is drawn per document,
             so that all its sentences speak of the same thing
    @once    keys of the frame that a document mentions once; a stage with nothing else is skipped
    @share   `3`: how often this theme is drawn, against the others

Inside a template `(a|b|)` picks one part, `{rule}` draws from a rule, never the same alternative
twice in a document, and `{P.him}` names a form of a variable whose alternatives are written
`Mara/she/her/her`. Articles and capitals are put right at the end.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

FORMS = {"": 0, "p": 1, "he": 1, "him": 2, "his": 3}
SOUNDS_LIKE_A_CONSONANT = ("uni", "use", "usu", "one", "once", "eu", "uti")
SOUNDS_LIKE_A_VOWEL = ("hour", "honest", "honou", "heir")


@dataclass(frozen=True, slots=True)
class Theme:
    """The tables of one theme, common rules included."""

    name: str
    plans: tuple[tuple[str, ...], ...]
    rules: dict[str, tuple[str, ...]]
    variables: dict[str, str]
    frames: tuple[dict[str, str], ...]
    once: frozenset[str]
    share: int


@dataclass(slots=True)
class Draft:
    """What one document has settled so far."""

    theme: Theme
    random: Random
    frame: dict[str, str]
    bound: dict[str, str] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)
    spent: set[str] = field(default_factory=set)


def read_sections(path: Path) -> dict[str, list[str]]:
    """Sections of a theme file, their lines as written; lines that begin with `#` are comments."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("@"):
            lines = sections.setdefault(line[1:].strip(), [])
        elif not line.startswith("#"):
            lines.append(line.strip())
    return sections


def read_frames(lines: list[str]) -> tuple[dict[str, str], ...]:
    frames: list[dict[str, str]] = [{}]
    for line in lines:
        if line:
            key, value = line.split("=", 1)
            frames[-1][key.strip()] = value.strip()
        elif frames[-1]:
            frames.append({})
    return tuple(frame for frame in frames if frame) or ({},)


def read_theme(path: Path, *, frames: Path, common: Path) -> Theme:
    sections = read_sections(common) | read_sections(path) | read_sections(frames)
    pairs = (line.split("=", 1) for line in sections.pop("let", []) if line)
    plans = tuple(tuple(line.split()) for line in sections.pop("plan") if line)
    records = read_frames(sections.pop("frame"))
    once = frozenset(" ".join(sections.pop("once", [])).split())
    share = int(sections.pop("share", ["1"])[0])
    rules = {name: tuple(line for line in lines if line) for name, lines in sections.items()}
    variables = {name.strip(): rule.strip() for name, rule in pairs}
    return Theme(path.stem, plans, rules, variables, records, once, share)


def draw(draft: Draft, rule: str) -> str | None:
    """An alternative that is new in this document and mentions no spent key. When all have been used,
    they may be used again. `None` if all of them mention a spent key."""
    if rule not in draft.theme.rules:
        raise KeyError(f"theme {draft.theme.name} has no rule {rule!r}")
    spent = ["{" + key + "}" for key in draft.spent & draft.theme.once]
    lines = [line for line in draft.theme.rules[rule] if not any(slot in line for slot in spent)]
    if not lines:
        return None
    used = draft.used.setdefault(rule, set())
    choice = draft.random.choice([line for line in lines if line not in used] or lines)
    used.add(choice)
    return choice


def split_parts(text: str) -> list[str]:
    """Cut at the bars that lie outside inner brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def pick_parts(draft: Draft, text: str) -> str:
    """Settle the outermost `(a|b)` groups, then those inside what was picked."""
    depth, start = 0, 0
    for at, char in enumerate(text):
        if char == "(":
            start = at if depth == 0 else start
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                picked = draft.random.choice(split_parts(text[start + 1 : at]))
                return pick_parts(draft, text[:start] + picked + text[at + 1 :])
    return text


def fill_slot(draft: Draft, slot: str) -> str:
    name, _, form = slot.partition(".")
    if name in draft.theme.variables:
        if name not in draft.bound:
            draft.bound[name] = expand(draft, draw(draft, draft.theme.variables[name]) or "")
        raw = draft.bound[name]
    elif name in draft.frame:
        draft.spent.add(name)
        raw = expand(draft, draft.frame[name])
    else:
        raw = expand(draft, draw(draft, name) or "")
    return raw.split("/")[FORMS[form]] if "/" in raw else raw


def expand(draft: Draft, text: str) -> str:
    text = pick_parts(draft, text)
    return re.sub(r"\{([^{}]+)\}", lambda match: fill_slot(draft, match.group(1)), text)


def choose_article(match: re.Match[str]) -> str:
    article, word = match.groups()
    vowel = word[0].lower() in "aeiou" and not word.lower().startswith(SOUNDS_LIKE_A_CONSONANT)
    return f"{article}{'n' if vowel or word.lower().startswith(SOUNDS_LIKE_A_VOWEL) else ''} {word}"


def polish(text: str) -> str:
    """Single spaces, no space before a comma, the right article, capitals after full stops."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r" ([,.;:?!])", r"\1", text)
    text = re.sub(r"\b([Aa]) (\w+)", choose_article, text)
    capital = re.compile(r'(^|[.!?] |[.]" )("?)([a-z])')
    return capital.sub(lambda match: match[1] + match[2] + match[3].upper(), text)


def write_document(theme: Theme, random: Random) -> str:
    """One paragraph: a plan, a frame, and a sentence or two for each stage of the plan."""
    draft = Draft(theme, random, random.choice(theme.frames))
    stages = [
        stage.rstrip("?")
        for stage in random.choice(theme.plans)
        if not stage.endswith("?") or random.random() < 0.5
    ]
    drawn = (draw(draft, stage) for stage in stages)
    return " ".join(polish(expand(draft, text)) for text in drawn if text is not None)
