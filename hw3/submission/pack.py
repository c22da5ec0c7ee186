"""`hw3 pack`: the homework's submission folder from a run's checkpoint, checked as its grader would."""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import shlex
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from hw3.common.atomic_io import write_json
from hw3.common.disk import check_new, gib
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.config.recipe import Recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.selection import Scored, scored_checkpoint
from hw3.runs.open_run import tokenizer_of
from hw3.submission.output_agreement import own_answers
from hw3.submission.verify import (
    ADAPTER,
    ADAPTER_BYTES,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREDICTION,
    check_answers,
    check_score,
    check_size,
)

TEMPLATES = Path(__file__).parent / "templates"
# The grader's PEFT by year; it refuses an adapter_config.json with keys that it does not know.
PEFT_OF_YEAR = {"2024": "peft-0.13.0"}
# Answered as a check where no rows are given.
SAMPLE_ROWS = 8


def pack_run(
    run: Path,
    *,
    checkpoint: str = "best",
    rows_to_answer: Path | None = None,
    out: Path | None = None,
    year: str | None = None,
    url: str | None = None,
) -> int:
    """Write the submission folder, check it in fresh processes, and move it into place.

    Args:
        run: the run folder, scored on its `data.eval`.
        checkpoint: which one; the best by default.
        rows_to_answer: rows for `prediction.json`; without them a few rows of `data.eval` are answered, as a check.
        out: the folder to make; `RUN-pack` by default.
        year: reduce the adapter's configuration to what that year's grader reads.
        url: where `download.sh` fetches the adapter's two files from, the address of their folder.

    Returns:
        0.

    Raises:
        UserError: the run, a file or an argument does not fit, or the adapter says what the year's PEFT cannot.
        RunFailed: the folder does not give our score or answers, or exceeds a limit; nothing is left behind.
    """
    scored = scored_checkpoint(run, checkpoint)
    out = out or run.with_name(f"{run.name}-pack")
    check_new(out, "OUT= (--out)")
    config = adapter_config(scored, year)
    if url is not None and not re.fullmatch(r"https?://\S+", url):
        raise UserError(f"--url {url}: an http(s) address is needed, of the folder that holds the adapter's two files")
    weights = scored.checkpoint.path / ADAPTER_WEIGHTS
    if weights.stat().st_size > ADAPTER_BYTES:
        raise UserError(f"{weights}: {gib(weights.stat().st_size)}; the course allows {gib(ADAPTER_BYTES)}")
    rows = read_rows(rows_to_answer or scored.data, need_output=False)
    if rows_to_answer is None:
        rows = rows[:SAMPLE_ROWS]
    tokenizer = tokenizer_of(run, scored.recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "pack"
        print(f"{rows_to_answer or scored.data}: {len(rows)} rows answered by hw3, then by the folder alone")
        own, constants = own_answers(scored, rows, rows_to_answer or scored.data)
        settings = prompt_settings(scored.recipe, tokenizer)
        _write_folder(folder, scored, config, {"utils.py": settings, "predict.py": constants}, url)
        # The model is not needed any more, and the next processes want its memory.
        gc.collect()
        torch.cuda.empty_cache()
        lines = [check_score(folder, scored, tokenizer)]
        lines += check_answers(folder, scored, rows, own, keep=rows_to_answer is not None)
        _write_readme(folder, scored, rows_to_answer, year)
        lines.append(check_size(folder))
        os.rename(folder, out)
    print(f"{out}: {scored.checkpoint.name} of {run}", *lines, sep="\n  ")
    return 0


def adapter_config(scored: Scored, year: str | None) -> dict[str, Any]:
    """The adapter's configuration as the folder holds it.

    Args:
        scored: the checkpoint.
        year: reduce it to the keys of that year's PEFT.

    Raises:
        UserError: the run has no adapter, or a key that must go is not at its default.
    """
    if scored.recipe.lora is None:
        raise UserError(
            f"{scored.run}: full fine-tuning has no adapter, which is what the grader takes; train with a lora "
            f"section, or write the whole model: hw3 export {scored.run}"
        )
    path = scored.checkpoint.path / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    base = Path(scored.recipe.model.pretrained_model_name_or_path)
    # Nobody else's machine has our folders, and their names are nobody else's business.
    config["base_model_name_or_path"] = base.name if base.is_dir() else str(base)
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes a set
    return config if year is None else reduced_config(config, PEFT_OF_YEAR[year], path)


def reduced_config(config: dict[str, Any], peft: str, path: Path) -> dict[str, Any]:
    """A LoRA configuration with the keys of an older PEFT alone.

    Args:
        config: as today's PEFT wrote it.
        peft: the older one's name, a JSON file beside the templates.
        path: where it came from, for messages.

    Raises:
        UserError: names every key that the older one does not know and that is not at its default.
    """
    known = json.loads((TEMPLATES / f"{peft}.json").read_text(encoding="utf-8"))
    package = known["package"]
    defaults = LoraConfig().to_dict()
    dropped = {key: value for key, value in config.items() if key not in known["keys"] and key != "peft_version"}
    problems = [
        f"{path}: {key}: found {json.dumps(value)}: {package} does not know this key, so only its default "
        f"({json.dumps(defaults.get(key))}) can be packed"
        for key, value in dropped.items()
        if value != defaults.get(key)
    ]
    if config["peft_type"] != "LORA":
        problems.append(f"{path}: peft_type: found {config['peft_type']}: LORA is needed")
    if config["init_lora_weights"] not in known["init_lora_weights"]:
        problems.append(
            f"{path}: init_lora_weights: found {json.dumps(config['init_lora_weights'])}: {package} cannot load such "
            "an adapter onto a quantized base"
        )
    if problems:
        raise UserError(*problems)
    return {key: value for key, value in config.items() if key in known["keys"]}


def prompt_settings(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The recipe's prompt and quantization as the constants of `utils.py`."""
    before, after = Encoder(tokenizer, recipe.prompt).text_around_turn()
    return {
        "BEFORE": before,
        "TURN": recipe.prompt.turn,
        "AFTER": after,
        "CHAT_TEMPLATE": recipe.prompt.chat_template,
        "QUANTIZATION": None if recipe.quantization is None else recipe.quantization.model_dump(),
    }


def fill_python(name: str, values: dict[str, Any]) -> str:
    """A Python template with its upper-case constants set, one line each at the top level."""
    text = _fill(name, r"{} = .*", {key: f"{key} = {_literal(value)}" for key, value in values.items()})
    ast.parse(text, feature_version=(3, 10))
    return text


def _literal(value: Any) -> str:
    """Python source of a value, text in double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    # JSON's escapes are Python's.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def fill_shell(name: str, values: dict[str, str]) -> str:
    """A shell template with its upper-case variables set."""
    return _fill(name, r"{}=.*", {key: f"{key}={shlex.quote(value)}" for key, value in values.items()})


def _fill(name: str, pattern: str, lines: dict[str, str]) -> str:
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    for key, line in lines.items():
        text, count = re.subn(f"^{pattern.format(key)}$", lambda match, line=line: line, text, flags=re.MULTILINE)
        assert count == 1, f"{name}: {count} lines set {key}"
    return text


def _write_folder(
    folder: Path, scored: Scored, config: dict[str, Any], constants: dict[str, dict[str, Any]], url: str | None
) -> None:
    """Everything but prediction.json and README.md."""
    adapter = folder / ADAPTER
    adapter.mkdir(parents=True)
    write_json(adapter / ADAPTER_CONFIG, config)
    shutil.copyfile(scored.checkpoint.path / ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS)
    for name, values in constants.items():
        (folder / name).write_text(fill_python(name, values), encoding="utf-8")
    download = {
        "URL": (url or "").rstrip("/"),
        "SHA256_CONFIG": file_sha256(adapter / ADAPTER_CONFIG),
        "SHA256_WEIGHTS": file_sha256(adapter / ADAPTER_WEIGHTS),
    }
    (folder / "download.sh").write_text(fill_shell("download.sh", download), encoding="utf-8")
    shutil.copyfile(TEMPLATES / "run.sh", folder / "run.sh")


def _write_readme(folder: Path, scored: Scored, rows_to_answer: Path | None, year: str | None) -> None:
    base = scored.recipe.model.pretrained_model_name_or_path
    hub = not Path(base).is_dir()
    versions = scored.manifest["versions"]
    files = {
        f"{ADAPTER}/": "adapter 權重與設定 · weights and configuration",
        "utils.py": "提示與量化設定 · prompt and quantization",
        "run.sh, predict.py": "推論 · inference",
        "download.sh": "下載並核對 adapter · fetches and checks the adapter",
    }
    if rows_to_answer is not None:
        files[PREDICTION] = f"`{rows_to_answer.name}` 的答案 · answers to it"
    low, high = scored.entry["mean_perplexity_ci95"]
    target = ""
    if year is not None:
        peft = PEFT_OF_YEAR[year].replace("-", " ")
        target = (
            f"`adapter_config.json` 只含 {year} 年評分環境（{peft}）認得的鍵 · holds only the keys that {peft} knows."
        )
    text = string.Template((TEMPLATES / "README.md").read_text(encoding="utf-8")).substitute(
        base=base if hub else Path(base).name,
        base_argument=base if hub else "BASE_MODEL",
        step=scored.checkpoint.step,
        data=scored.data.name,
        rows=scored.entry["rows"],
        score=f"{scored.entry['mean_perplexity']:.3f}",
        low=f"{low:.2f}",
        high=f"{high:.2f}",
        files="\n".join(f"| `{name}` | {what} |" for name, what in files.items()),
        versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "bitsandbytes", "peft")),
        python=scored.manifest["python"],
        target=target,
    )
    (folder / "README.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
