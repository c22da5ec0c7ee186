"""Fixtures of the generation tests: a run of the tiny recipe with scores and predictions, and two random models."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import REPOSITORY, character_tokenizer, hw3, write_rows
from tiny_models import build_gemma2, build_llama
from transformers import PreTrainedModel

from hw3.data.prompt import Prompt
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.selection import select_checkpoint
from hw3.runs.run import Run


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to the repository: the tiny recipe's paths are relative to it."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `twelve.json`, twelve rows, and `run`, whose two checkpoints are scored on them."""
    folder = tmp_path_factory.mktemp("predict")
    rows = json.loads((REPOSITORY / "data/eval.json").read_text(encoding="utf-8"))[:12]
    (folder / "twelve.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    settings = ["training.max_steps=10", "training.save_steps=5", f"data.eval={folder / 'twelve.json'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        hw3("train", "recipes/tiny/qlora.yaml", "--run", folder / "run", *settings)
        run = Run(folder / "run")
        assert "the last: none is scored yet" in select_checkpoint(run, run.load_recipe(), "best")[1]
        hw3("eval", folder / "run")
    return folder


@pytest.fixture(scope="session")
def first_output(trained: Path) -> tuple[str, str]:
    """Predict the twelve rows with the best checkpoint; return what the command printed to stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        return hw3("predict", trained / "run")


@pytest.fixture
def run(trained: Path, first_output: tuple[str, str], tmp_path: Path) -> Path:
    """Return a copy of the run, with predictions, that a test may change."""
    return shutil.copytree(trained / "run", tmp_path / "run")


@pytest.fixture
def best(trained: Path) -> str:
    """Return the name of the best checkpoint."""
    ((_, results),) = Run(trained / "run").read_results().items()
    assert results.best is not None
    return results.best.checkpoint


@pytest.fixture(params=["gemma", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Return a random model; every test runs with two architectures."""
    return build_gemma2() if request.param == "gemma" else build_llama()


@pytest.fixture
def encoder() -> Encoder:
    """Return an encoder with a system text of 32 tokens."""
    return Encoder(
        character_tokenizer(), Prompt(system="天地玄黃宇宙洪荒日月盈昃辰宿列張" * 2, turn="問：{instruction}\n答：")
    )


@pytest.fixture
def rows(encoder: Encoder, tmp_path: Path) -> list[EncodedRow]:
    """Return 24 rows."""
    return [encoder.encode(row) for row in read_rows(write_rows(tmp_path / "rows.json", 24))]


@pytest.fixture
def limits(rows: list[EncodedRow]) -> list[int]:
    """Return a limit for each row, between 6 and 25 new tokens."""
    return [6 + number % 20 for number in range(len(rows))]


@pytest.fixture
def forward_sizes(model: PreTrainedModel) -> list[int]:
    """Return a list to which each forward of `model` appends its number of rows."""
    sizes: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    return sizes
