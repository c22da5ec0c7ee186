"""Everything runs on the CPU, in float32, with no network."""

from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY, character_tokenizer, write_recipe  # sets the environment, before transformers
from hypothesis import HealthCheck, settings
from transformers import Gemma2Config, Gemma2ForCausalLM

# Shared machines stall; a slow draw is no failure.
settings.register_profile("hw3", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hw3")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums over threads depend on their number; equalities are asserted at one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def mini_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma-2 of 0.1 M parameters with the character tokenizer, soft-caps and a sliding window."""
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
    """A recipe file: NF4 and LoRA on the mini base, 8 rows a step, 12 steps, a checkpoint every 4."""
    return write_recipe(tmp_path, mini_base)


@pytest.fixture(scope="session")
def scored_run(tmp_path_factory: pytest.TempPathFactory, mini_base: Path) -> Path:
    """The mini recipe's run with its three checkpoints and scores. Copy it to change it."""
    from hw3.cli import main

    folder = tmp_path_factory.mktemp("scored")
    assert main(["train", str(write_recipe(folder, mini_base)), "--run", str(folder / "run")]) == 0
    assert main(["eval", str(folder / "run")]) == 0
    return folder / "run"
