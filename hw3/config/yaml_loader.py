"""YAML with line numbers: plain values, plus where each one was written, and duplicate keys found."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hw3.common.errors import UserError


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text readably."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what YAML 1.1 would misread; `1e5` is a number in 1.2 alone.
    quoted = "\n" in text or not reads_as_text(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML as this project writes it: keys in order, one line a text."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6)


KeyPath = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """The YAML 1.2 core schema. PyYAML's own 1.1 reads `no` as false and `1e-4` as a string."""


_CoreLoader.yaml_implicit_resolvers = {}
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_CoreLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_CoreLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def _construct_decimal_int(loader: _CoreLoader, node: yaml.ScalarNode) -> int:
    # PyYAML reads a leading zero as octal; the core schema does not.
    return int(loader.construct_scalar(node))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_decimal_int)


@dataclass
class Source:
    """Values read from one or more places.

    Attributes:
        name: the file's path as the user gave it.
        values: plain dicts, lists, strings and numbers.
        places: key path to `"file:line"` or `"command line"`.
        problems: duplicate keys and keys that are no text.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Where the key at `path` was written, or its nearest parent that was."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def override(self, assignment: str) -> None:
        """Apply one `section.key=value` from the command line; the value is read as YAML.

        Raises:
            UserError: there is no `=`, an empty key, or a value that is no YAML.
        """
        dotted, equals, text = assignment.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            raise UserError(f"command line: {assignment!r} is not of the form section.key=value")
        try:
            value = yaml.load(text, _CoreLoader)
        except yaml.YAMLError as error:
            raise UserError(f"command line: {dotted}: {text!r} is not a YAML value: {_one_line(error)}") from error
        parent = self.values
        for depth, key in enumerate(keys[:-1]):
            if not isinstance(parent.get(key), dict):
                parent[key] = {}
                self.places[keys[: depth + 1]] = "command line"
            parent = parent[key]
        parent[keys[-1]] = value
        for path in [path for path in self.places if path[: len(keys)] == keys]:
            del self.places[path]
        self.places[keys] = "command line"


def reads_as_text(text: str) -> bool:
    """Whether an unquoted `text` would be read back as text, not as a number or a truth value."""
    node = _CoreLoader.resolve(_CoreLoader(""), yaml.ScalarNode, text, (True, False))
    return node == "tag:yaml.org,2002:str"


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


def read_text(path: Path) -> str:
    """A file's text, strictly UTF-8, without a byte-order mark.

    Raises:
        UserError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None


def read_yaml(path: Path) -> Source:
    """Read one YAML mapping.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML, or not a mapping.
    """
    source = Source(str(path))
    try:
        node = yaml.compose(read_text(path), _CoreLoader)
        if isinstance(node, yaml.MappingNode):
            source.values = _build(node, (), source)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {_one_line(error)}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: holds no `key: value` lines at the top level")
    return source


def _build(node: yaml.Node, path: KeyPath, source: Source) -> Any:
    source.places.setdefault(path, f"{source.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{source.name}:{key_node.start_mark.line + 1}"
            key = key_node.value
            if not isinstance(key, str):
                source.problems.append(f"{place}: a key must be a word")
                continue
            if key in values:
                source.problems.append(f"{place}: {'.'.join(map(str, (*path, key)))}: given a second time")
                continue
            source.places[(*path, key)] = place
            values[key] = _build(value_node, (*path, key), source)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), source) for index, item in enumerate(node.value)]
    loader = _CoreLoader("")
    try:
        return loader.construct_object(node)
    finally:
        loader.dispose()
