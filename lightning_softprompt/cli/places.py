"""Where a key stands in what a user wrote: the file, the line and the path of the key, or the option."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lightning_softprompt.errors import nearest


def place_of(keys: Sequence[str], arguments: Sequence[str], value: str | None = None) -> str:
    """Where the last of some keys stands, in words; the keys themselves where it is not found.

    Args:
        keys: the path of the key, of which some may be left out in the middle, such as `init_args`.
        arguments: the command line, with its config files.
        value: what is said to stand there, where that is known; it tells one place from another.

    Example:
        >>> place_of(["data", "batch_size"], ["fit", "--data.init_args.batch_size=many"])
        '--data.init_args.batch_size'
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and _is_within(keys, option[2:].removesuffix("+").split(".")):
            return option
    found = [
        (f"{file}, line {line}, {'.'.join(path)}", content)
        for file in config_files(arguments)
        for path, line, content in _entries(_tree(file), ())
        if _holds(keys, path)
    ]
    fitting = [place for place, content in found if value is None or _fits(value, content)]
    return next(iter(fitting or [place for place, _ in found]), ".".join(keys))


def config_files(arguments: Sequence[str]) -> list[str]:
    """The config files that a command line names."""
    found = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=False):
        option, sign, value = argument.partition("=")
        if option in ("--config", "-c"):
            found.append(value if sign else after)
    return found


def wrong_in_configs(arguments: Sequence[str], known: Sequence[str]) -> str | None:
    """What is wrong with the config files of a command line, as far as their text and their outer keys tell.

    The parser overlooks unknown keys over empty mappings, and takes anything in place of a group of keys.

    Args:
        arguments: the command line.
        known: the keys that may stand in a config, with dots between a group and its keys.
    """
    for file in filter(os.path.isfile, config_files(arguments)):
        try:
            tree = _tree(file)
        except UnicodeDecodeError as error:
            return f"{file} is no text in UTF-8 ({error}); give a config in YAML or JSON"
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            return f"{file}, line {line}: this is no YAML ({error.problem}); look for brackets, quotes and indents"
        except yaml.YAMLError as error:
            return f"{file} is no YAML ({error})"
        if not isinstance(tree, yaml.MappingNode):
            return f"{file} holds no keys; a config is a mapping, as --print_config shows"
        for path, line, content in _entries(tree, ()):
            wrong = _wrong_entry(path, content, known)
            if wrong:
                return f"{file}, line {line}, {'.'.join(path)}: {wrong}"
    return None


def _wrong_entry(path: tuple[str, ...], content: yaml.Node, known: Sequence[str]) -> str:
    groups = {key.partition(".")[0] for key in known if "." in key}
    if len(path) > 2 or (len(path) == 2 and path[0] not in groups):
        return ""
    key = ".".join(path)
    if not any(each == key or each.startswith(f"{key}.") for each in known):
        within = path[:-1]
        beside = {each.split(".")[len(within)] for each in known if _below(each, within)}
        return f"{path[-1]!r} is not known; {nearest(path[-1], beside, '--help lists what is')}"
    is_text = isinstance(content, yaml.ScalarNode) and content.tag == "tag:yaml.org,2002:str"  # the name of a file
    if key in groups and not isinstance(content, yaml.MappingNode) and not is_text:
        return "expected keys below it; leave it out where there are none"
    return ""


def _below(key: str, within: tuple[str, ...]) -> bool:
    return key.split(".")[: len(within)] == list(within) and key.count(".") >= len(within)


def _tree(file: str) -> yaml.Node | None:
    return yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)


def _entries(node: yaml.Node | None, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int, yaml.Node]]:
    """Each key with the path of those above it, its line, and what stands there."""
    if isinstance(node, yaml.SequenceNode):
        for number, each in enumerate(node.value):
            yield from _entries(each, (*above, str(number)))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*above, str(key.value))
            yield path, key.start_mark.line + 1, value
            yield from _entries(value, path)


def _holds(keys: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a path holds all keys in their order."""
    rest = iter(path)
    return bool(keys) and all(key in rest for key in keys)


def _is_within(keys: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a path ends as the keys do and holds all of them in their order."""
    return _holds(keys, path) and path[-1] == keys[-1]


def _fits(value: str, content: yaml.Node) -> bool:
    """Whether a value, as Python shows it, is what stands in a config."""
    return value == str(yaml.SafeLoader("").construct_object(content, deep=True))
