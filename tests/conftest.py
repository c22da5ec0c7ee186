"""Fixtures. Tests run on the CPU, in float32, without network."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch

# helpers sets environment variables that transformers reads when it is imported, so it must be imported first.
from helpers import REPOSITORY, character_tokenizer, write_recipe, write_rows
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.modeling.loading import load_tokenizer

# Shared machines can stall, so a slow example is no failure. `make test-slow` takes the profile `long`.
settings.register_profile("hw3", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("hw3"), max_examples=2_000, deadline=timedelta(seconds=5))
settings.load_profile("hw3")


@pytest.fixture(scope="session", autouse=True)
def use_one_thread() -> None:
    """Use one thread, because the rounding of sums depends on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def mini_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma-2 model with 0.1 M parameters, the character tokenizer, soft-capping and a sliding window."""
    folder = tmp_path_factory.mktemp("mini") / "base"
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    Gemma2ForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def mini_recipe(tmp_path: Path, mini_base: Path) -> Path:
    """A recipe file: QLoRA on the mini base model, 12 steps of 8 rows, a checkpoint every 4 steps."""
    return write_recipe(tmp_path, mini_base)


@pytest.fixture
def mini_model(mini_base: Path) -> PreTrainedModel:
    """The mini base model in float32 and evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(mini_base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def encoded_rows(mini_recipe: Path, tmp_path: Path) -> list[EncodedRow]:
    """30 rows with outputs, encoded with the prompt of the mini recipe."""
    recipe = load_recipe(mini_recipe)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    return [encoder.encode(row) for row in read_rows(write_rows(tmp_path / "rows.json", 30))]


@pytest.fixture(scope="session")
def scored_run(tmp_path_factory: pytest.TempPathFactory, mini_base: Path) -> Path:
    """A run of the mini recipe with three checkpoints and their scores. All tests share it: change only copies."""
    from hw3.cli import main

    folder = tmp_path_factory.mktemp("scored")
    assert main(["train", str(write_recipe(folder, mini_base)), "--run", str(folder / "run")]) == 0
    assert main(["eval", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def finished_run(mini_recipe: Path, tmp_path: Path) -> Path:
    """A run of the mini recipe that was never interrupted."""
    from hw3.cli import main

    assert main(["train", str(mini_recipe), "--run", str(tmp_path / "finished")]) == 0
    return tmp_path / "finished"
