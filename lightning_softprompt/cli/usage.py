"""What a parser refuses in a config or an option, in one line: where it stands, what was expected, and what is near."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable
from importlib import import_module
from itertools import takewhile
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser

from lightning_softprompt.cli.places import place_of, wrong_in_configs
from lightning_softprompt.cli.terminal import print_error
from lightning_softprompt.errors import nearest
from lightning_softprompt.prompts.characters import shown

_UNKNOWN = re.compile(r"(?:Group '(?P<group>.*?)' does not accept o|does not accept o|O)ption '(?P<key>.*?)'")
_KEY = re.compile(r'Parser key "(.*?)"')
_GIVEN = re.compile(r"(?:Given|Got) value: (.*)")
_EXPECTED = re.compile(r"(?:Expected an? |Not a valid subclass of )(.+?)(?:\. Got value|$)", re.MULTILINE)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "NoneType": "null",
    "list": "a list",
    "list[str]": "a list of texts",
    "dict": "a mapping",
}
_QUOTES = "; put quotes around it if it is a text: YAML takes no, yes, on, off and digits for something else"


class OneLine(ArgumentParser):
    """A parser whose errors are one line, with exit status 2.

    jsonargparse makes a parser for each class in a config, too. What such a parser says first is the reason of all that
    is said around it.
    """

    refusals: ClassVar[list[tuple[ArgumentParser, str]]] = []
    is_debugged: ClassVar[bool] = False
    folder: ClassVar[str] = "."  # from where the paths of config files lead

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parse the arguments, whose config files are read before, as what is wrong with a file is best said of it."""
        given = list(args or ())
        commands = _commands(self)
        own = list(takewhile(lambda each: each not in commands, given))  # a subcommand's parser reads what is behind it
        wrong = wrong_in_configs(own, [*_keys(self), *commands]) if self.exit_on_error else None
        if self.exit_on_error:
            OneLine.folder = os.getcwd()
        if wrong is not None:
            self.error(wrong)
        return super().parse_args(args, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit; parsers inside of others remember why and hand the error on."""
        self.refusals.append((self, message))
        if not self.exit_on_error:
            super().error(message, ex)
        os.chdir(self.folder)  # jsonargparse is in the folder of the config that it reads, and goes back when it ends
        line = describe(message, self, self.refusals)
        self.refusals.clear()
        print_error(f"{message}\nerror: {line}" if self.is_debugged else line)
        raise SystemExit(2) from ex


def describe(message: str, parser: ArgumentParser, refusals: list[tuple[ArgumentParser, str]]) -> str:
    """One line for what a parser refused.

    Args:
        message: all that it said.
        parser: it.
        refusals: what it and the parsers inside of it said, the innermost first.
    """
    arguments = list(getattr(parser, "args", ()))
    innermost = message[: found.end()] if (found := _GIVEN.search(message)) else message  # ends before other branches
    owner, reason = next((each for each in refusals if _start(each[1]) in innermost), (parser, message))
    above = _KEY.findall(innermost[: max(0, innermost.find(_start(reason)))])
    keys = [part for key in above for part in key.split(".")]
    unknown = _UNKNOWN.match(reason) or _UNKNOWN.search(_start(reason))
    if unknown:
        key = ".".join(filter(None, (unknown["group"], unknown["key"])))
        of_subcommand = re.match(r"Subcommand '(.*?)'", reason)
        if of_subcommand:
            owner = _commands(parser)[of_subcommand[1]]
        return f"{place_of([*keys, *key.split('.')], arguments)}: {shown(key)} is not known{_hint(key, _keys(owner))}"
    if reason.startswith("the following arguments are required: "):
        return _about_missing(_listed(reason), parser, place_of(keys, arguments))
    if reason.startswith("unrecognized arguments: "):
        words = _listed(reason, " ")
        options = [f"--{key}" for key in _keys(owner)]
        return f"{words[0]} is not known{_hint(words[0].partition('=')[0], options)}"
    return _about_value(reason if reason != message else innermost, keys, arguments)


def _about_missing(missing: list[str], parser: Any, place: str) -> str:
    if place:
        return f"{place}: {', '.join(missing)} missing; give what is missing below it"
    of_subcommand = missing[0].partition(".")[0] in _commands(parser)
    options = [f"--{each.partition('.')[2] if of_subcommand else each}" for each in missing]
    where = ", in the config (--config run.yaml) or as options" if of_subcommand else ""
    return f"{', '.join(options)} missing; give what is missing{where}"


def _about_value(reason: str, keys: list[str], arguments: list[str]) -> str:
    inner = _KEY.match(reason)
    if inner is None:
        return reason
    keys = [*keys, *inner[1].split(".")]
    body = reason[inner.end() :].lstrip(":\n ")
    given = found[1] if (found := _GIVEN.search(body)) else None
    _, union, deepest = body.rpartition("Subtypes: [")
    single = _EXPECTED.search(body)
    expected = deepest.partition("]\n")[0] if union else single and single[1]
    place = place_of(keys, arguments, given)
    problem = _about_class(body) or _about_spec(given or "")
    if problem or expected is None or given is None:
        return f"{place}: {problem or body.partition(' - Parser key')[0]}"
    hint = nearest(given, _choices(expected))
    advice = _QUOTES if "str" in expected and re.search(r"\b(True|False|\d+)\b", given) else ""
    return f"{place}: expected {_in_words(expected)}, found {shown(given)}{hint and f'; {hint}'}{advice}"


def _about_class(body: str) -> str:
    """What is wrong with a `class_path`; empty where nothing is."""
    missing = re.search(r"module '(.*?)' has no attribute '(.*?)'", body)
    if missing:
        return f"{missing[1]} has no {missing[2]!r}{_hint(missing[2], _names_in(missing[1]))}"
    other = re.search(r"Import path (\S+) does not correspond to a subclass of (\S+)", body)
    if other:
        return f"{other[1]} is no {other[2]}; give the class_path of one"
    problem = re.search(r"Problem with given class_path '(.*?)':\n\s*(.*)", body)
    if problem and problem[2].endswith("object has no attribute 'keys'"):
        return f"{problem[1]}: expected keys below init_args"
    return f"{problem[1]}: {problem[2]}" if problem else ""


def _about_spec(given: str) -> str:
    """What a mapping with a `class_path` holds beside what belongs there; empty where it holds nothing else."""
    try:
        found = ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return ""
    known = ("class_path", "init_args", "dict_kwargs")
    others = [str(key) for key in found if key not in known] if isinstance(found, dict) and known[0] in found else []
    return f"{others[0]!r} is not known beside class_path{_hint(others[0], known)}" if others else ""


def _names_in(module: str) -> list[str]:
    try:
        return dir(import_module(module))
    except ImportError:
        return []


def _choices(expected: str) -> list[str]:
    """The texts of which one is expected; empty where any other type is."""
    return re.findall(r"'(.*?)'", "".join(re.findall(r"Literal\[(.*?)\]", f"{expected}]")))


def _in_words(expected: str) -> str:
    """Types as jsonargparse writes them, in words."""
    if choices := _choices(expected):
        return "one of " + ", ".join(choices)
    names = re.findall(r"list\[.*?\]|<class '.*?'>|[\w.]+", expected)
    words = []
    for name in names:
        bare = re.sub(r"<class '(.*)'>", r"\1", name)
        words.append(bare if bare in _WORDS else "list" if bare.startswith("list[") else bare.rpartition(".")[2])
    return " or ".join(dict.fromkeys(_WORDS.get(word, word) for word in words))


def _keys(parser: Any) -> list[str]:
    """The keys that a parser takes, but those that only print something."""
    named = [action.dest for action in parser._actions if action.option_strings]
    return [key for key in named if key.split(".")[-1] not in ("help", "print_shtab")]


def _hint(key: str, known: Iterable[str]) -> str:
    """Words about the nearest of what is known, or about all of it where nothing is near and there is little."""
    listed = list(known)
    all_of_it = f"known: {', '.join(listed)}" if 0 < len(listed) <= 20 else "--help lists what is"
    return f"; {nearest(key, listed, all_of_it)}"


def _listed(reason: str, separator: str = ", ") -> list[str]:
    return reason.partition(": ")[2].split(separator)


def _commands(parser: Any) -> dict[str, Any]:
    """The subcommands of a parser and their parsers."""
    return parser._subcommands_action._name_parser_map if parser._subcommands_action else {}


def _start(reason: str) -> str:
    """The first line of a reason, by which it is found again in what is said around it."""
    return reason.splitlines()[0].strip() if reason.strip() else reason
