"""Read YAML as plain values that remember where each one was written, and write YAML.

ruamel.yaml is not used, because it reports only the first repeated key, and reads `1_000` as a number and dates as
objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from hw3.common.errors import UserError
from hw3.common.text_files import read_utf8

# Where a value stands in a document, such as ("training", "learning_rate") or ("prompt", "examples", 0, "output").
KeyPath = tuple[str | int, ...]

_COMMAND_LINE = "command line"
# Far above what a recipe needs. Parsing takes 10 s per million characters, and Python's recursion is limited.
_MAX_CHARACTERS = 300_000
_MAX_DEPTH = 50
_MAX_DIGITS = 20  # PyTorch's integers have at most 19
_TAG_PREFIX = "tag:yaml.org,2002:"


def _parse_float(text: str) -> float:
    return float(text.replace(".", "", 1) if text.lstrip("+-").lower() in (".inf", ".nan") else text)


# The types of the YAML 1.2 core schema, by tag: pattern, possible first characters, conversion. PyYAML implements
# YAML 1.1, which reads `no` as false, `012` as octal and `1e-4` as text.
_CORE_TYPES: dict[str, tuple[re.Pattern[str], list[str], Callable[[str], Any]]] = {
    f"{_TAG_PREFIX}null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""], lambda text: None),
    f"{_TAG_PREFIX}bool": (
        re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"), lambda text: text.lower() == "true",
    ),
    f"{_TAG_PREFIX}int": (re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"), int),
    f"{_TAG_PREFIX}float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
        _parse_float,
    ),
}  # fmt: skip


class _CoreLoader(yaml.SafeLoader):
    """Loader for the YAML 1.2 core schema without aliases, which can make a small file endless."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node; refuse aliases, deep nesting, and escapes that are no characters."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error(event, f"found the alias *{event.anchor}, expected the value itself")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _error(event, f"values are nested more than {_MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and re.search("[\ud800-\udfff]", node.value):
            raise _error(node, "found an escape from U+D800 to U+DFFF, which is not a character")
        return node


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first_characters, _) in _CORE_TYPES.items():
    _CoreLoader.add_implicit_resolver(_tag, _pattern, _first_characters)


class _InvalidYamlError(Exception):
    """A text is not valid YAML.

    Attributes:
        line: the line of the mistake, from 1.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


@dataclass
class YamlDocument:
    """The values of a YAML file, with overrides applied, and the location of each key.

    Attributes:
        path: the file's path as the user wrote it.
        values: plain dicts, lists, strings and numbers.
        locations: `"file:line"` or `"command line"` by key path.
        problems: keys that are repeated or are not text.
    """

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def locate(self, key_path: KeyPath) -> str:
        """Return the location of a key, or of its nearest parent that was written."""
        while key_path and key_path not in self.locations:
            key_path = key_path[:-1]
        return self.locations.get(key_path, self.path)

    def problem(self, key_path: KeyPath, message: str) -> str:
        """Return a message about a key that begins with its location and its name."""
        return f"{self.locate(key_path)}: {'.'.join(map(str, key_path)) or 'the file'}: {message}"

    def override(self, assignment: str) -> None:
        """Apply one `section.key=value` assignment from the command line; its value is parsed as YAML.

        Raises:
            UserError: the assignment has no `=` or an empty key, or its value is not YAML.
        """
        dotted, equals, text = assignment.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            raise UserError(f"command line: found {assignment!r}, expected section.key=value")
        if len(keys) > _MAX_DEPTH:
            raise UserError(f"command line: found a key of {len(keys)} parts, expected section.key=value")
        scratch = YamlDocument(_COMMAND_LINE)
        try:
            value = _parse(text, keys, scratch)
        except _InvalidYamlError as error:
            raise UserError(f"command line: {dotted}: {text!r} is not valid YAML: {error}") from error
        if scratch.problems:
            raise UserError(*scratch.problems)
        parent = self.values
        for depth, key in enumerate(keys[:-1]):
            if not isinstance(parent.get(key), dict):
                parent[key] = {}
                self.locations[keys[: depth + 1]] = _COMMAND_LINE
            parent = parent[key]
        parent[keys[-1]] = value
        for key_path in [key_path for key_path in self.locations if key_path[: len(keys)] == keys]:
            del self.locations[key_path]
        self.locations[keys] = _COMMAND_LINE


def read_yaml(path: Path) -> YamlDocument:
    """Read a YAML file whose top level is a mapping.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML, or not a mapping.
    """
    document = YamlDocument(str(path))
    text = read_utf8(path)
    if len(text) > _MAX_CHARACTERS:
        raise UserError(f"{path}: has {len(text):,} characters, expected a recipe of at most {_MAX_CHARACTERS:,}")
    try:
        values = _parse(text, (), document)
    except _InvalidYamlError as error:
        raise UserError(f"{path}:{error.line}: invalid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: found no keys at the top level, expected lines of `key: value`")
    document.values = values
    return document


def dump_yaml(values: dict[str, Any]) -> str:
    """Return values as YAML, with keys in their order and each text on one line."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6)


def _parse(text: str, key_path: KeyPath, document: YamlDocument) -> Any:
    """Return the value of a YAML text; record the locations and problems of its keys in `document`.

    Raises:
        _InvalidYamlError: the text is not valid YAML.
    """
    loader = None
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        return None if node is None else _build_value(node, key_path, document)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _InvalidYamlError(line, str(error.problem)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _InvalidYamlError(line, f"found the character U+{error.character:04X}") from error
    except (ValueError, OverflowError) as error:  # raised by chr()
        line = loader.line + 1 if loader is not None else 1
        raise _InvalidYamlError(line, "found an escape of a character above U+10FFFF") from error


def _build_value(node: yaml.Node, key_path: KeyPath, document: YamlDocument) -> Any:
    """Return the value of a node; record the locations and problems of its keys in `document`."""
    document.locations.setdefault(key_path, _describe_location(node, document))
    if isinstance(node, yaml.ScalarNode):
        return _build_scalar(node)
    if node.tag not in (f"{_TAG_PREFIX}map", f"{_TAG_PREFIX}seq"):
        raise _error(node, f"found the tag {_describe_tag(node)}, which is not supported")
    if isinstance(node, yaml.SequenceNode):
        return [_build_value(item, (*key_path, index), document) for index, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        location = _describe_location(key_node, document)
        key = key_node.value
        if not isinstance(key, str):
            document.problems.append(f"{location}: found a key that is not text")
            continue
        if key in values:
            document.problems.append(f"{location}: {'.'.join(map(str, (*key_path, key)))}: repeated key")
            continue
        document.locations[(*key_path, key)] = location
        values[key] = _build_value(value_node, (*key_path, key), document)
    return values


def _build_scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.tag == f"{_TAG_PREFIX}str":
        return text
    if node.tag not in _CORE_TYPES:
        raise _error(node, f"found the tag {_describe_tag(node)}, which is not supported")
    pattern, _, convert = _CORE_TYPES[node.tag]
    if not pattern.fullmatch(text):
        raise _error(node, f"found {text[:60]!r}, which is not a value of type {_describe_tag(node)}")
    if convert is int and len(text) > _MAX_DIGITS:
        raise _error(node, f"found an integer of {len(text)} digits, expected at most {_MAX_DIGITS}")
    return convert(text)


def _describe_location(node: yaml.Node, document: YamlDocument) -> str:
    return document.path if document.path == _COMMAND_LINE else f"{document.path}:{node.start_mark.line + 1}"


def _describe_tag(node: yaml.Node) -> str:
    return node.tag.replace(_TAG_PREFIX, "!!")


def _error(place: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=cast(yaml.Mark, place.start_mark))


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes a text if it has several lines or would be read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value again wherever it stands."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what YAML 1.1 would misread; `1e5` is a number only in YAML 1.2.
    is_text = _CoreLoader.resolve(_CoreLoader(""), yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
    style = None if is_text and "\n" not in text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
