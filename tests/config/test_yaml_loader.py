"""YAML 1.2 values, texts that read back, and files that are no mapping."""

import dataclasses
import math
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.config.yaml_loader import YamlDocument, read_yaml


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_values_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    text = (REPOSITORY / "recipes/tiny/qlora.yaml").read_text(encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(text.replace("use_cpu: true", "run_name: no").replace("2e-3", "2E-3"), encoding="utf-8")
    recipe = load_recipe(path, ["training.seed=012", "training.weight_decay=1"])
    assert recipe.training["run_name"] == "no"
    assert recipe.training["learning_rate"] == 0.002 and recipe.training["seed"] == 12
    # `no` is written with quotes, because YAML 1.1 readers would read it as false.
    assert yaml.safe_load(recipe.to_yaml())["training"]["run_name"] == "no"


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
NUMBERS = st.from_regex(r"[-+0-9eE._]{1,6}", fullmatch=True)


@given(name=NAMES | NUMBERS)
def test_any_text_reads_back(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    recipe = load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml")
    named = dataclasses.replace(recipe, training=recipe.training | {"run_name": name})
    path = tmp_path_factory.getbasetemp() / "named.yaml"
    path.write_text(named.to_yaml(), encoding="utf-8")
    assert load_recipe(path).training["run_name"] == name


LAUGHS = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in pairwise("abcdefghijklmnop"))
NO_KEYS = "F: found no keys at the top level, expected lines of `key: value`"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", NO_KEYS),
        ("- 1", NO_KEYS),
        ("\ufeff", NO_KEYS),
        ("a: 1\nb: [1", "F:2: invalid YAML: expected ',' or ']', but got '<stream end>'"),
        (LAUGHS, "F:2: invalid YAML: found the alias *a, expected the value itself"),
        ("a: &x\n  b: *x", "F:2: invalid YAML: found the alias *x, expected the value itself"),
        ("a: 1\nb: !!int abc", "F:2: invalid YAML: found 'abc', which is not a value of type !!int"),
        ("a: !!float x", "F:1: invalid YAML: found 'x', which is not a value of type !!float"),
        ("a: !!bool 1", "F:1: invalid YAML: found '1', which is not a value of type !!bool"),
        ("a: !!timestamp x", "F:1: invalid YAML: found the tag !!timestamp, which is not supported"),
        ("a: !mine x", "F:1: invalid YAML: found the tag !mine, which is not supported"),
        ("a: !mine [x]", "F:1: invalid YAML: found the tag !mine, which is not supported"),
        ("a: !!set {x}", "F:1: invalid YAML: found the tag !!set, which is not supported"),
        ("a: !!python/object:os.system x", "F:1: invalid YAML: found the tag !!python/object:os.system, which is not "),
        ('a: 1\nb: "\\U00110000"', "F:2: invalid YAML: found an escape of a character above U+10FFFF"),
        ('a: 1\nb: "\\Uffffffff"', "F:2: invalid YAML: found an escape of a character above U+10FFFF"),
        ('a: 1\nb: "\\ud800"', "F:2: invalid YAML: found an escape from U+D800 to U+DFFF, which is not a character"),
        ('"\\udfff": 1', "F:1: invalid YAML: found an escape from U+D800 to U+DFFF, which is not a character"),
        ("a: 1\nb: \x1b[2J", "F:2: invalid YAML: found the character U+001B"),
        ("a: " + "9" * 5000, "F:1: invalid YAML: found an integer of 5000 digits, expected at most 20"),
        ("a:\n " + "[" * 3000, "F:2: invalid YAML: values are nested more than 50 levels deep"),
        ("- " * 3000, "F:1: invalid YAML: values are nested more than 50 levels deep"),
        ("a: {" * 3000, "F:1: invalid YAML: values are nested more than 50 levels deep"),
        ("a: 1\n" * 60_001, "F: has 300,005 characters, expected a recipe of at most "),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_file_that_is_not_valid_ends_at_once_with_one_message(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        load_recipe(path)
    (found,) = error.value.problems
    assert found.replace(str(path), "F").startswith(problem)
    assert time.monotonic() - started < 5  # seconds; the machine may be busy


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    latin, pipe = tmp_path / "latin.yaml", tmp_path / "pipe.yaml"
    latin.write_bytes("a: 1\nb: é".encode("latin-1"))
    os.mkfifo(pipe)
    for path, problem in (
        (latin, f"{latin}:2: invalid UTF-8: byte 0xe9"),
        (pipe, f"{pipe}: not a regular file"),
        (Path("/dev/zero"), "/dev/zero: not a regular file"),
        (tmp_path, f"{tmp_path}: cannot be read: Is a directory"),
        (tmp_path / "none.yaml", f"{tmp_path}/none.yaml: no such file"),
    ):
        with pytest.raises(UserError) as error:
            read_yaml(path)
        assert str(error.value).startswith(problem)


def test_explicit_core_tags_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(
        "\ufeffa: !!str 1\nb: !!float 1\nc: !!seq [-.INF, 012]\nd: 1_000\ne: &x 2001-01-01", encoding="utf-8"
    )
    assert read_yaml(path).values == {"a": "1", "b": 1.0, "c": [-math.inf, 12], "d": "1_000", "e": "2001-01-01"}


@pytest.mark.parametrize(
    ("assignment", "problem"),
    [
        (
            "a.b=!!int x",
            "command line: a.b: '!!int x' is not valid YAML: found 'x', which is not a value of type !!int",
        ),
        ("a=&x [*x]", "command line: a: '&x [*x]' is not valid YAML: found the alias *x, expected the value itself"),
        ("a.b={c: 1, c: 2}", "command line: a.b.c: repeated key"),
        (".".join("a" * 999) + "=1", "command line: found a key of 999 parts, expected section.key=value"),
    ],
)
def test_override_that_is_not_valid_is_refused(assignment: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        YamlDocument("F").override(assignment)
    assert str(error.value) == problem


@given(st.text(max_size=60) | st.text("[]{}:,-?&*!|>'\"%@`#~ \n\t\\Uuxd0189.ae", max_size=60))
def test_any_text_is_read_or_refused_with_its_line(text: str) -> None:
    document = YamlDocument("F")
    try:
        document.override(f"a={text}")
    except UserError as error:
        assert all(problem.startswith("command line: a") for problem in error.problems)
    else:
        assert yaml.safe_dump(document.values, allow_unicode=True).encode()
