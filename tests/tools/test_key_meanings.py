"""The examples of docs/recipe.md are valid values of their keys, and no key of the project is left out."""

from pathlib import Path

import pytest
from document_blocks.key_meanings import COMMON_KEYS, PROJECT_KEYS
from document_blocks.recipes import SECTIONS
from helpers import REPOSITORY

from hw3.config.recipe import load_recipe

# What some examples need beside them.
COMPANIONS = {
    "generation.temperature": ["generation.do_sample=true"],
    "generation.top_k": ["generation.do_sample=true"],
    "generation.top_p": ["generation.do_sample=true"],
    "generation.length_penalty": ["generation.num_beams=4"],
    "generation.early_stopping": ["generation.num_beams=4"],
    "evaluation.patience": ["evaluation.during_training=true"],
}


def test_every_key_of_the_project_is_explained() -> None:
    keys = {f"{section}.{name}" for section, schema in SECTIONS.items() for name in schema.model_fields}
    assert set(PROJECT_KEYS) == keys | {"speed"}


@pytest.mark.parametrize("key", [*PROJECT_KEYS, *COMMON_KEYS])
def test_example_is_a_valid_value(key: str) -> None:
    _, example = {**PROJECT_KEYS, **COMMON_KEYS}[key]
    overrides = [*COMPANIONS.get(key, []), f"{key}={example}"]
    recipe = load_recipe(REPOSITORY / Path("recipes/tiny/qlora.yaml"), overrides)
    section, _, name = key.partition(".")
    written = recipe.document.values[section]
    assert (written[name] if name else written) is not None
