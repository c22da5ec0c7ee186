"""Run a packed submission with the course's 2024 packages, and compare scores and predictions with ours.

    python -m venv course && course/bin/pip install transformers==4.45.1 peft==0.13.0 accelerate torch
    python tools/check_pack.py --python course/bin/python

The course's environment creates two small random base models, a Llama and a Gemma-2, in its own file format. This
environment fine-tunes each on the sample rows, scores it and packs it. The course's environment then runs the pack's
`run.sh`, and scores the rows with the homework's loop and the pack's `utils.py`. The models are not quantized:
bitsandbytes 0.44.1, the course's version, has 4-bit weights on a GPU only. Writes docs/pack/course_environment.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hw3.cli import main as hw3
from hw3.common.atomic_io import write_json
from hw3.runs.manifest import git_commit, installed_versions, python_version

REPOSITORY = Path(__file__).parent.parent
COURSE_SCRIPT = Path(__file__).with_name("check_pack_course_env.py")
MODELS = ("llama", "gemma2")
TRAINING_STEPS = 60
PREDICTED_ROWS = 16
MAX_RELATIVE_DIFFERENCE = 1e-4  # of the mean perplexities


def main() -> int:
    """Check both models and write the comparison; the exit status is 1 if a prediction or a score differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="Python of the course's environment")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs/pack/course_environment.json")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    # Not resolved: the python of a virtual environment is a symbolic link.
    python = arguments.python.absolute()
    rows, course = [], {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            row, course = check_model(model, python, Path(folder))
        rows.append(row)
        print(row)
    write_json(
        arguments.output,
        {
            "current_versions": installed_versions() | {"python": python_version()},
            "course_versions": course["versions"],
            "commit": git_commit(),
            "lora_config_keys": course["lora_config_keys"],
            "quantization": "none: bitsandbytes 0.44.1 has no 4-bit weights on a CPU",
            "rows": rows,
        },
    )
    return 0 if all(agrees(row) for row in rows) else 1


def agrees(row: dict[str, Any]) -> bool:
    """Return whether both environments give the same score and predictions."""
    return row["relative_difference"] < MAX_RELATIVE_DIFFERENCE and row["equal_predictions"] == row["predictions"]


def check_model(model: str, python: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, score and pack one model here, then score and predict with the pack in the course's environment.

    Args:
        model: `llama` or `gemma2`.
        python: Python of the course's environment.
        folder: an empty folder.

    Returns:
        A row of the comparison, and the report of the course's environment.
    """
    base, run, pack, rows = folder / "base", folder / "run", folder / "pack", folder / "rows.json"
    run_course_script(python, "base", model, str(REPOSITORY / "data/tiny/tokenizer.json"), str(base))
    data = json.loads((REPOSITORY / "data/eval.json").read_text(encoding="utf-8"))[:PREDICTED_ROWS]
    inputs = [{key: row[key] for key in ("id", "instruction")} for row in data]
    # Special tokens typed in an instruction must stay text in the course's environment as well.
    inputs.append({"id": "special", "instruction": f"<bos>{inputs[0]['instruction']}<eos>"})
    rows.write_text(json.dumps(inputs), encoding="utf-8")
    overrides = [f"model.pretrained_model_name_or_path={base}", "quantization=null"]
    overrides += [f"training.max_steps={TRAINING_STEPS}", f"training.save_steps={TRAINING_STEPS}"]
    commands = (
        ["train", "recipes/tiny/qlora.yaml", "--run", str(run), *overrides],
        ["eval", str(run)],
        ["pack", str(run), "--grader-year", "2024", "--input", str(rows), "--output", str(pack)],
    )
    for command in commands:
        if hw3(command):
            sys.exit(f"{' '.join(command)}: failed")
    entries = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    current_score = next(entry["mean_perplexity"] for entry in entries if entry["checkpoint"])

    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    predict = ["bash", "run.sh", str(base), "adapter_checkpoint", str(rows), str(folder / "predictions.json")]
    subprocess.run(predict, cwd=pack, env={**os.environ, "PATH": path, "PYTHONPATH": ""}, check=True)
    course = run_course_script(python, "score", str(base), str(pack), str(REPOSITORY / "data/eval.json"))
    current_predictions = json.loads((pack / "prediction.json").read_text(encoding="utf-8"))
    course_predictions = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    row = {
        "model": model,
        "current_score": current_score,
        "course_score": course["mean_perplexity"],
        "relative_difference": abs(course["mean_perplexity"] / current_score - 1),
        "predictions": len(current_predictions),
        "equal_predictions": sum(a == b for a, b in zip(current_predictions, course_predictions, strict=True)),
        "distinct_outputs": len({prediction["output"] for prediction in current_predictions}),
    }
    return row, course


def run_course_script(python: Path, *arguments: str) -> dict[str, Any]:
    """Run `check_pack_course_env.py` with the course's Python and return the JSON on its last line."""
    command = [str(python), str(COURSE_SCRIPT), *arguments]
    completed = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, stdout=subprocess.PIPE, text=True)
    if completed.returncode:
        sys.exit(f"{COURSE_SCRIPT.name} {arguments[0]}: failed")
    return json.loads(completed.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
