"""Write the model card of the base model from its records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from base_model.encoding import MAX_PAIR_CHARACTERS
from base_model.settings import BOS, EOS, HEAD_DIM, PAD, REPOSITORY, UNK, TrainingSettings
from base_model.vocabulary import MIN_COUNT
from hw3.common.errors import UserError

RECORDS = REPOSITORY / "docs/base"
DIRECTIONS = {"classical_to_modern": "classical → modern", "modern_to_classical": "modern → classical"}
LOSSES = ("held_out_loss", "held_out_loss_nf4")
SHOTS = (0, 4)
OPTIMIZERS = {"muon": "Muon for the matrices of the layers, AdamW for the rest", "adamw": "AdamW"}


def write_model_card(folder: Path) -> None:
    """Write `README.md` from the folder's `training.json` and the records in `docs/base`.

    Raises:
        UserError: the folder has no `training.json`.
    """
    record = _read_json(folder / "training.json")
    if record is None:
        raise UserError(f"{folder}: no training.json in this folder")
    settings = TrainingSettings(**record["settings"])
    trials = _read_json(RECORDS / "trials.json")
    corpus = record["corpus"]
    template = (RECORDS / "card.md").read_text(encoding="utf-8")
    text = template.format(
        **{**dataclasses.asdict(settings), **corpus, "optimizer": OPTIMIZERS[settings.optimizer]},
        **{key: record[key] for key in ("machine", "quotes_machine", "torch", "transformers")},
        parameters=record["parameters"] / 1e6,
        head_dim=HEAD_DIM,
        pad=PAD,
        eos=EOS,
        bos=BOS,
        unk=UNK,
        min_count=MIN_COUNT,
        max_pair=MAX_PAIR_CHARACTERS,
        unknown=corpus["unknown_characters"],
        tokens=settings.rows * settings.length,
        minutes=record["seconds"] / 60,
        losses=format_losses(record, _read_json(RECORDS / "second_run.json")),
        trials=format_trials(trials) if trials else "No record.",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def format_losses(record: dict[str, Any], second_run: dict[str, Any] | None) -> str:
    """Return a table of the held-out losses: of this run, of a second run, and of the saved weights."""
    runs = [("before the quotation marks", record)]
    if second_run:
        runs.append(("a second run with the same settings", second_run))
    rows = []
    for name, title in DIRECTIONS.items():
        for label, run in runs:
            rows.append([title, label, *(f"{run[loss][f'{name}_{n}']:.4f}" for loss in LOSSES for n in SHOTS)])
        if saved := record.get("held_out_loss_saved"):
            rows.append([title, "the saved model", *(f"{saved[f'{name}_{n}']:.4f}" for n in SHOTS), "", ""])
    return format_table(["", "run", "no pair", "four pairs", "NF4, no pair", "NF4, four pairs"], rows)


def format_trials(trials: list[dict[str, Any]]) -> str:
    """Return a table with one line per trial: its changes from the first trial of its group, and its held-out loss."""
    rows = []
    first: dict[str, Any] = {}
    for trial in trials:
        settings = trial["settings"]
        if trial["group"] != first.get("group"):
            first = trial
        changes = [f"{key} {value}" for key, value in settings.items() if value != first["settings"][key]]
        means = [sum(trial[loss][f"{name}_{n}"] for n in SHOTS) / 2 for loss in LOSSES for name in DIRECTIONS]
        name = f"**{trial['group']}**" if trial is first else ", ".join(changes) or "no change, run again"
        size, tokens = trial["parameters"] / 1e6, settings["steps"] * settings["rows"] * settings["length"] / 1e6
        rows.append([name, f"{size:.2f}", f"{tokens:,.0f}", *(f"{mean:.4f}" for mean in means)])
    names = list(DIRECTIONS.values())
    header = ["change", "M parameters", "M tokens", *names, *(f"NF4, {name}" for name in names)]
    return format_table(header, rows)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
