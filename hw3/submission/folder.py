"""Write the files of a submission folder."""

from __future__ import annotations

import shutil
import string
from pathlib import Path
from typing import Any

from hw3.common.atomic_io import write_json
from hw3.common.hashing import file_sha256
from hw3.evaluation.selection import ScoredCheckpoint
from hw3.modeling.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hw3.submission.adapter_config import PEFT_BY_GRADER_YEAR
from hw3.submission.fill_templates import TEMPLATES_DIR, fill_python_template, fill_shell_template

ADAPTER_DIR = "adapter_checkpoint"
PREDICTION_FILE = "prediction.json"
README_PACKAGES = ("torch", "transformers", "bitsandbytes", "peft")
# Every file of a submission; `prediction.json` is optional.
SUBMISSION_FILES = frozenset(
    {
        "README.md",
        "download.sh",
        "predict.py",
        "run.sh",
        "utils.py",
        PREDICTION_FILE,
        f"{ADAPTER_DIR}/{ADAPTER_CONFIG}",
        f"{ADAPTER_DIR}/{ADAPTER_WEIGHTS}",
    }
)


def write_folder(
    folder: Path,
    scored: ScoredCheckpoint,
    adapter_config: dict[str, Any],
    constants: dict[str, dict[str, Any]],
    url: str | None,
) -> None:
    """Write all files except `prediction.json` and `README.md`.

    Args:
        folder: the folder to create.
        scored: the checkpoint whose weights are copied.
        adapter_config: content of `adapter_config.json`.
        constants: values of the constants, by name of the Python template.
        url: web address from which `download.sh` gets the adapter's files; None leaves it empty.
    """
    adapter_dir = folder / ADAPTER_DIR
    adapter_dir.mkdir(parents=True)
    write_json(adapter_dir / ADAPTER_CONFIG, adapter_config)
    shutil.copyfile(scored.checkpoint.path / ADAPTER_WEIGHTS, adapter_dir / ADAPTER_WEIGHTS)
    for name, values in constants.items():
        (folder / name).write_text(fill_python_template(name, values), encoding="utf-8")
    variables = {
        "URL": (url or "").rstrip("/"),
        "SHA256_CONFIG": file_sha256(adapter_dir / ADAPTER_CONFIG),
        "SHA256_WEIGHTS": file_sha256(adapter_dir / ADAPTER_WEIGHTS),
    }
    (folder / "download.sh").write_text(fill_shell_template("download.sh", variables), encoding="utf-8")
    shutil.copyfile(TEMPLATES_DIR / "run.sh", folder / "run.sh")


def write_readme(folder: Path, scored: ScoredCheckpoint, input_file: Path | None, grader_year: str | None) -> None:
    """Write `README.md`, in Chinese and English.

    Args:
        folder: the submission folder.
        scored: the checkpoint with its scores.
        input_file: the rows of `prediction.json`; None if there is no such file.
        grader_year: the year whose grader can read the adapter's configuration; None for the installed PEFT.
    """
    base = scored.recipe.model.pretrained_model_name_or_path
    is_local = Path(base).is_dir()
    files = {
        f"{ADAPTER_DIR}/": "adapter 權重與設定 · weights and configuration",
        "utils.py": "提示與量化設定 · prompt and quantization",
        "run.sh, predict.py": "推論 · inference",
        "download.sh": "下載並核對 adapter · downloads and checks the adapter",
    }
    if input_file is not None:
        files[PREDICTION_FILE] = f"`{input_file.name}` 的答案 · predictions for it"
    target = ""
    if grader_year is not None:
        peft = PEFT_BY_GRADER_YEAR[grader_year].replace("-", " ")
        target = (
            f"`adapter_config.json` 只含 {grader_year} 年評分環境（{peft}）認得的鍵 · "
            f"contains only keys that {peft} knows."
        )
    low, high = scored.entry.mean_perplexity_ci95
    text = string.Template((TEMPLATES_DIR / "README.md").read_text(encoding="utf-8")).substitute(
        base=Path(base).name if is_local else base,
        base_argument="BASE_MODEL" if is_local else base,
        step=scored.checkpoint.step,
        data=scored.data_file.name,
        rows=scored.entry.rows,
        score=f"{scored.entry.mean_perplexity:.3f}",
        low=f"{low:.2f}",
        high=f"{high:.2f}",
        files="\n".join(f"| `{name}` | {description} |" for name, description in files.items()),
        versions=", ".join(f"{package} {scored.manifest.versions[package]}" for package in README_PACKAGES),
        python=scored.manifest.python,
        target=target,
    )
    (folder / "README.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
