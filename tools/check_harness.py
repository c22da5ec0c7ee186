"""Score exported models with lm-evaluation-harness, and compare each row with the run's `rows.parquet`.

    python tools/check_harness.py                          train and check the runs in `RUNS`, and record the result
    python tools/check_harness.py --run outputs/tiny-qlora  check an existing run

The harness is an independent implementation of log-likelihoods. It loads the folder that `hw3 export` writes, so merged
weights, tokenizer and scores are checked together. It is installed into `.venv-harness`, which uses the other packages
of this environment; the first call needs a package index. Writes docs/export/harness.json for the runs in `RUNS`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from hw3.cli import main as hw3
from hw3.common.atomic_io import write_json
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.selection import select_scored_checkpoint
from hw3.runs.manifest import git_commit
from hw3.runs.run import ROWS_FILE, Run

REPOSITORY = Path(__file__).parent.parent
HARNESS_SCRIPT = Path(__file__).with_name("check_harness_env.py")
HARNESS = "lm_eval==0.4.13"
MAX_DIFFERENCE_NATS = 1e-3  # of a row's log-likelihood; float32 sums of a merged and an unmerged model differ
NOT_INSTALLED = 3  # exit status

TRAINING_STEPS = 60
# Each row of the check: a kind of training, as changes to recipes/tiny/qlora.yaml.
RUNS = {
    "qlora": [],
    "dora": ["quantization=null", "lora.use_dora=true"],
    "full": ["quantization=null", "lora=null", "training.learning_rate=2e-4"],
}


def main() -> int:
    """Check the runs; return 1 if a row's log-likelihood differs, 3 if the harness cannot be installed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a scored run on float32; default: train one run of each kind")
    parser.add_argument("--environment", type=Path, default=REPOSITORY / ".venv-harness", help="folder of the harness")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs/export/harness.json")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    python = create_environment(arguments.environment)
    if python is None:
        return NOT_INSTALLED
    records = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.run is not None:
            records.append({"run": arguments.run.name} | check_run(arguments.run, python, Path(scratch)))
        else:
            for name, overrides in RUNS.items():
                folder = Path(scratch, name)
                run = train(folder / "run", overrides)
                records.append({"run": name} | check_run(run, python, folder))
    versions = [record.pop("versions") for record in records]
    for record in records:
        print(", ".join(f"{key} {value}" for key, value in record.items()))
    if arguments.run is None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, {"versions": versions[0], "commit": git_commit(), "rows": records})
    return 0 if all(agrees(record) for record in records) else 1


def agrees(record: dict[str, Any]) -> bool:
    """Return whether every row has the same ids, and the same log-likelihood up to rounding."""
    return record["max_difference_nats"] <= MAX_DIFFERENCE_NATS and record["equal_ids"] == record["scored_rows"]


def create_environment(folder: Path) -> Path | None:
    """Install the harness into a virtual environment that also finds the packages of this one.

    Returns:
        Its Python; None if the packages could not be installed.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin/python"
    scheme = {"base": str(folder.absolute()), "platbase": str(folder.absolute())}
    purelib = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    (purelib / "this_environment.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    # Torch and transformers keep this environment's versions: pip finds them installed.
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", HARNESS]
    if subprocess.run(install, stdout=sys.stderr).returncode:
        print(f"{folder}: {HARNESS} could not be installed", file=sys.stderr)
        return None
    return python


def train(folder: Path, overrides: list[str]) -> Path:
    """Train the embedded model on the sample rows, and score it; return the run."""
    steps = [f"training.max_steps={TRAINING_STEPS}", f"training.save_steps={TRAINING_STEPS}"]
    run_hw3("train", "recipes/tiny/qlora.yaml", "--run", str(folder), *steps, *overrides)
    run_hw3("eval", str(folder))
    return folder


def check_run(folder: Path, python: Path, scratch: Path) -> dict[str, Any]:
    """Export a run's best checkpoint, score it with the harness, and compare the rows.

    Args:
        folder: the run, scored on its `data.eval`.
        python: Python of the harness's environment.
        scratch: a folder for the exported model.
    """
    run = Run(folder)
    scored = select_scored_checkpoint(run)
    exported, rows_file = scratch / "exported", scratch / "rows.json"
    run_hw3("export", str(folder), "--output", str(exported))
    encoder = Encoder(run.load_tokenizer(scored.recipe), scored.recipe.prompt)
    rows = [(row, encoder.encode(row)) for row in read_rows(scored.data_file)]
    ids = [{"output": row.output, "prompt_ids": e.prompt_ids, "output_ids": e.output_ids} for row, e in rows]
    rows_file.write_text(json.dumps(ids), encoding="utf-8")
    command = [str(python), str(HARNESS_SCRIPT), str(exported), str(rows_file)]
    # Nothing is downloaded. PYTHONPATH could name another environment.
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if completed.returncode:
        sys.exit(f"{HARNESS_SCRIPT.name}: failed")
    harness = json.loads(completed.stdout.splitlines()[-1])

    results = run.read_results_on(scored.data_file)
    assert results is not None, "the checkpoint has scores on this file"
    table = pq.read_table(results[0] / ROWS_FILE, filters=[("entry", "=", scored.entry.key)])
    nll = dict(zip(table["id"].to_pylist(), table["nll"].to_pylist(), strict=True))
    differences = [
        abs(nll[row.id] + loglikelihood)
        for (row, _), loglikelihood in zip(rows, harness["loglikelihoods"], strict=True)
    ]
    return {
        "scored_rows": len(rows),
        "equal_ids": harness["equal_ids"],
        "nll_nats": sum(nll.values()),
        "harness_nll_nats": -sum(harness["loglikelihoods"]),
        "max_difference_nats": max(differences),
        "versions": harness["versions"],
    }


def run_hw3(*command: str) -> None:
    """Run a command of hw3; exit if it fails."""
    if hw3(list(command)):
        sys.exit(f"hw3 {' '.join(command)}: failed")


if __name__ == "__main__":
    sys.exit(main())
