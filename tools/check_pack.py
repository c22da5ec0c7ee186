"""Runs a packed submission with the course's 2024 packages: scores and answers there against ours here.

    python -m venv course && course/bin/pip install transformers==4.45.1 peft==0.13.0 accelerate torch
    python tools/check_pack.py --python course/bin/python

The other environment makes a small random base, a Llama and a Gemma-2, in its own format; here it is tuned on the
sample rows, scored and packed; there `run.sh` answers rows and the homework's loop scores them with the pack's
`utils.py`. No 4-bit weights: bitsandbytes 0.44.1, the course's, has them on a GPU only. Writes
docs/pack/course_environment.json.
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
from hw3.runs.run_dir import environment

REPOSITORY = Path(__file__).parent.parent
THERE = Path(__file__).with_name("check_pack_there.py")
MODELS = ("llama", "gemma2")
STEPS = 60
ANSWERED_ROWS = 16


def main() -> int:
    """Check both models and write what came out; 1 where an answer or a score differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="the other environment's")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs/pack/course_environment.json")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    # Not resolved: a virtual environment's python is a link.
    python = arguments.python.absolute()
    rows, last = [], {}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            row, last = check(model, python, Path(folder))
        rows.append(row)
        print(row)
    here = environment()
    write_json(
        arguments.out,
        {
            "here": here["versions"] | {"python": here["python"]},
            "there": last["versions"],
            "commit": here["git_commit"],
            "keys_of_peft": last["keys_of_peft"],
            "quantization": "none: bitsandbytes 0.44.1 has no 4-bit weights on a CPU",
            "rows": rows,
        },
    )
    return 0 if all(row["relative_difference"] < 1e-4 and row["equal_answers"] == row["answers"] for row in rows) else 1


def check(model: str, python: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One model's way through both environments.

    Args:
        model: `llama` or `gemma2`.
        python: the other environment's.
        folder: an empty one.

    Returns:
        A row of the table, and what the other environment says of itself.
    """
    base, run, pack, rows = folder / "base", folder / "run", folder / "pack", folder / "rows.json"
    there(python, "base", model, str(REPOSITORY / "data/tiny/tokenizer.json"), str(base))
    data = json.loads((REPOSITORY / "data/eval.json").read_text(encoding="utf-8"))[:ANSWERED_ROWS]
    asked = [{key: row[key] for key in ("id", "instruction")} for row in data]
    # Typed special tokens stay text there, too.
    asked.append({"id": "special", "instruction": f"<bos>{asked[0]['instruction']}<eos>"})
    rows.write_text(json.dumps(asked), encoding="utf-8")
    overrides = [f"model.pretrained_model_name_or_path={base}", "quantization=null"]
    overrides += [f"training.max_steps={STEPS}", f"training.save_steps={STEPS}"]
    commands = (
        ["train", "recipes/tiny/qlora.yaml", "--run", str(run), *overrides],
        ["eval", str(run)],
        ["pack", str(run), "--for", "2024", "--input", str(rows), "--out", str(pack)],
    )
    for command in commands:
        if hw3(command):
            sys.exit(f"{' '.join(command)}: failed")
    entries = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    ours = next(entry["mean_perplexity"] for entry in entries if entry["checkpoint"])
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}
    answered = ["bash", "run.sh", str(base), "adapter_checkpoint", str(rows), str(folder / "answers.json")]
    subprocess.run(answered, cwd=pack, env=environment, check=True)
    said = there(python, "score", str(base), str(pack), str(REPOSITORY / "data/eval.json"))
    here_answers = json.loads((pack / "prediction.json").read_text(encoding="utf-8"))
    there_answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    row = {
        "model": model,
        "score_here": ours,
        "score_there": said["mean_perplexity"],
        "relative_difference": abs(said["mean_perplexity"] / ours - 1),
        "answers": len(here_answers),
        "equal_answers": sum(a == b for a, b in zip(here_answers, there_answers, strict=True)),
        "different_answers": len({answer["output"] for answer in here_answers}),
    }
    return row, said


def there(python: Path, *words: str) -> dict[str, Any]:
    """Run the other half under the other python; its last line is JSON."""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([str(python), str(THERE), *words], env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{THERE.name} {words[0]}: failed")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
