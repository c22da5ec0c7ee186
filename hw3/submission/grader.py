"""Compute the number that the homework's grader prints, with this project's faster evaluator.

    python -m hw3.submission.grader --base_model_path BASE --peft_path ADAPTER --test_data_path public_test.json

As in the grader, `get_prompt(instruction)` and `get_bnb_config()` come from `utils.py` in the current folder, and the
output is the line `Mean perplexity: <float>`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from hw3.common.console import escaped_output, print_error
from hw3.common.errors import UserError, first_line
from hw3.config.schema import ModelSection
from hw3.data.rows import read_rows
from hw3.evaluation.batch_size import auto_tokens_per_batch
from hw3.evaluation.perplexity import score_rows, summarize
from hw3.modeling.adapter_io import InvalidAdapterError
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_model, load_tokenizer
from hw3.modeling.logits import verify_output_head
from hw3.submission.grader_encoding import encode_as_grader


def grade(
    base_model_path: str, peft_path: Path, test_data_path: Path, utils_path: Path, *, dtype: str = "bfloat16"
) -> float:
    """Return the mean perplexity that the homework's `ppl.py` prints.

    Args:
        base_model_path: folder of the base model, or its name on the Hub.
        peft_path: folder of the adapter.
        test_data_path: rows with outputs.
        utils_path: the student's `utils.py`. Its code is run.
        dtype: compute dtype of the base model. The grader uses bfloat16.

    Raises:
        UserError: a file, the model or the adapter does not fit.
    """
    module = _load_module(utils_path)
    get_prompt = _get_function(module, utils_path, "get_prompt")
    get_bnb_config = _get_function(module, utils_path, "get_bnb_config")
    rows = read_rows(test_data_path)
    section = ModelSection(pretrained_model_name_or_path=base_model_path, dtype=dtype)
    tokenizer = load_tokenizer(section)
    encoded_rows = [encode_as_grader(tokenizer, row, get_prompt(row.instruction)) for row in rows]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(section, get_bnb_config(), device).eval()
    verify_output_head(model, min(encoded_rows, key=len))
    try:
        AdapterSlot(model).load(peft_path)
    except InvalidAdapterError as error:
        raise UserError(str(error)) from error
    tokens_per_batch = auto_tokens_per_batch(model, max(map(len, encoded_rows)))
    with tqdm(total=len(encoded_rows), unit="row", disable=None, leave=False) as progress_bar:
        scores = score_rows(model, encoded_rows, tokens_per_batch=tokens_per_batch, on_batch=progress_bar.update)
    return summarize(scores).mean_perplexity


def _load_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; it must define get_prompt and get_bnb_config. Run this command in a folder that "
            "`make pack` has written, or set --utils FILE"
        )
    # The grader runs in the folder of utils.py, so the file may import its neighbors, also later inside a function.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location("utils", path, loader=SourceFileLoader("utils", str(path)))
    assert spec is not None and spec.loader is not None, "a loader was given"
    module = sys.modules["utils"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    return module


def _get_function(module: ModuleType, path: Path, name: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        raise UserError(f"{path}: does not define {name}")
    return getattr(module, name)


def main(argv: list[str] | None = None) -> int:
    """Print the mean perplexity; return 0, or 2 if a file, the model or the adapter does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--base_model_path", required=True, help="folder of the base model, or its name on the Hub")
    parser.add_argument("--peft_path", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--test_data_path", type=Path, required=True, help="rows with outputs")
    parser.add_argument("--utils", type=Path, default=Path("utils.py"), help="default: utils.py in the current folder")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args(argv)
    try:
        mean_perplexity = grade(
            arguments.base_model_path,
            arguments.peft_path,
            arguments.test_data_path,
            arguments.utils,
            dtype=arguments.dtype,
        )
    except UserError as error:
        print_error(f"hw3.submission.grader: {error}")
        return 2
    print(f"Mean perplexity: {mean_perplexity}")
    return 0


if __name__ == "__main__":
    with escaped_output():
        sys.exit(main())
