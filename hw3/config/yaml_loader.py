"""Read YAML as plain values that remember where each one was written, and write YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hw3.common.errors import UserError

# Where a value stands in a document, such as ("training", "learning_rate") or ("prompt", "examples", 0, "output").
KeyPath = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """Loader for the YAML 1.2 core schema. PyYAML implements YAML 1.1, which reads `no` as false and `1e-4` as text."""


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
    # PyYAML reads a number with a leading zero as octal; the core schema reads it as decimal.
    return int(loader.construct_scalar(node))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_decimal_int)


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
        try:
            value = yaml.load(text, _CoreLoader)
        except yaml.YAMLError as error:
            raise UserError(f"command line: {dotted}: {text!r} is not valid YAML: {_to_one_line(error)}") from error
        parent = self.values
        for depth, key in enumerate(keys[:-1]):
            if not isinstance(parent.get(key), dict):
                parent[key] = {}
                self.locations[keys[: depth + 1]] = "command line"
            parent = parent[key]
        parent[keys[-1]] = value
        for key_path in [key_path for key_path in self.locations if key_path[: len(keys)] == keys]:
            del self.locations[key_path]
        self.locations[keys] = "command line"


def read_yaml(path: Path) -> YamlDocument:
    """Read a YAML file whose top level is a mapping.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML, or not a mapping.
    """
    document = YamlDocument(str(path))
    try:
        node = yaml.compose(_read_utf8(path), _CoreLoader)
        if isinstance(node, yaml.MappingNode):
            document.values = _build_value(node, (), document)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: invalid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: invalid YAML: {_to_one_line(error)}") from error
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: found no keys at the top level, expected lines of `key: value`")
    return document


def dump_yaml(values: dict[str, Any]) -> str:
    """Return values as YAML, with keys in their order and each text on one line."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**6)


def _read_utf8(path: Path) -> str:
    """Return a file's text; a byte-order mark is accepted. Raise `UserError` if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: invalid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; save the file as "
            "UTF-8"
        ) from None


def _build_value(node: yaml.Node, key_path: KeyPath, document: YamlDocument) -> Any:
    """Return the value of a node; record the locations and problems of its keys in `document`."""
    document.locations.setdefault(key_path, f"{document.path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            location = f"{document.path}:{key_node.start_mark.line + 1}"
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
    if isinstance(node, yaml.SequenceNode):
        return [_build_value(item, (*key_path, index), document) for index, item in enumerate(node.value)]
    loader = _CoreLoader("")
    try:
        return loader.construct_object(node)
    finally:
        loader.dispose()


def _to_one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes a text if it has several lines or would be read as something else than text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what YAML 1.1 would misread; `1e5` is a number only in YAML 1.2.
    is_text = _CoreLoader.resolve(_CoreLoader(""), yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str"
    style = None if is_text and "\n" not in text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
