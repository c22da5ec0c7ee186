"""YAML 1.2 values, texts that read back, and files that are no mapping."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe


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


@pytest.mark.parametrize("text", ["a: [1", "- 1", "a: !!python/object:os.system x", ""])
def test_file_without_a_mapping_is_reported(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert len(error.value.problems) == 1
