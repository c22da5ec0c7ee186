"""The homework grader's own call: the same number, at our speed.

    python -m hw3.submission.grader --base_model_path BASE --peft_path ADAPTER --test_data_path public_test.json

Takes `get_prompt(instruction)` and `get_bnb_config()` from `utils.py` in the current folder, as the grader does, and
prints `Mean perplexity: ...`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from hw3.common.errors import UserError
from hw3.config.schema import ModelSection
from hw3.data.rows import read_rows
from hw3.evaluation.batch_size import tokens_that_fit
from hw3.evaluation.perplexity import score_rows, summarize
from hw3.modeling.adapter_io import BadAdapter
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_model, load_tokenizer
from hw3.modeling.logits import check_head
from hw3.submission.grader_encoding import encode_as_grader


def grade(
    base_model_path: str, peft_path: Path, test_data_path: Path, utils: Path, *, dtype: str = "bfloat16"
) -> float:
    """The mean perplexity that the homework's `ppl.py` prints.

    Args:
        base_model_path: a folder, or a name on the hub.
        peft_path: the adapter's folder.
        test_data_path: rows with outputs.
        utils: the student's `utils.py`; its code is run.
        dtype: the base's compute dtype; the grader's is bfloat16.

    Raises:
        UserError: a file, the model or the adapter does not fit.
    """
    module = _load(utils)
    get_prompt, get_bnb_config = (_function(module, utils, name) for name in ("get_prompt", "get_bnb_config"))
    rows = read_rows(test_data_path)
    section = ModelSection(pretrained_model_name_or_path=base_model_path, dtype=dtype)
    tokenizer = load_tokenizer(section)
    encoded = [encode_as_grader(tokenizer, row, get_prompt(row.instruction)) for row in rows]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(section, get_bnb_config(), device).eval()
    check_head(model, min(encoded, key=len))
    try:
        AdapterSlot(model).load(peft_path)
    except BadAdapter as error:
        raise UserError(str(error)) from error
    budget = tokens_that_fit(model, max(map(len, encoded)))
    with tqdm(total=len(encoded), unit="row", disable=None, leave=False) as bar:
        scores = score_rows(model, encoded, tokens_per_batch=budget, on_batch=bar.update)
    return summarize(scores).mean_perplexity


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("utils", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(
            f"{path}: no such file; get_prompt and get_bnb_config come from it: run this in a folder made by "
            "`make pack`, or give --utils FILE"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, path: Path, name: str) -> Callable[..., object]:
    if not hasattr(module, name):
        raise UserError(f"{path}: has no {name}")
    return getattr(module, name)


def main(argv: list[str] | None = None) -> int:
    """Parse, grade, print; 2 where something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--base_model_path", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--peft_path", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--test_data_path", type=Path, required=True, help="rows with outputs")
    parser.add_argument("--utils", type=Path, default=Path("utils.py"), help="default: utils.py here")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args(argv)
    try:
        mean = grade(
            arguments.base_model_path,
            arguments.peft_path,
            arguments.test_data_path,
            arguments.utils,
            dtype=arguments.dtype,
        )
    except UserError as error:
        print(f"hw3.submission.grader: {error}", file=sys.stderr)
        return 2
    print(f"Mean perplexity: {mean}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
