"""Blocks of docs/study.md, in English and in Traditional Chinese: tables, and sentences with values of the records.

The sentences are in docs/study/text.yaml. A field in braces is a value of `compute_values`. What a sentence concludes
from the figures is repeated there as `claims`, so that filling the page fails when new records say otherwise.
"""

from __future__ import annotations

import operator
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import yaml
from study.analysis import SCHEDULE_KEYS, SETTINGS_KEYS, Record, Study
from study.figures import name_setting, sort_cases

from document_blocks.sources import REPOSITORY, format_table, read_json
from document_blocks.study_values import FOLDER, Spread, compute_values, few_shot_scores, load_study, read_errors

LINE_WIDTH = 128
_CHINESE, _PUNCTUATION = "[\u3000-\u9fff\uff00-\uffef]", "[，。；：、（）「」]"
NAMES = {
    "en": {"tiny": "embedded model", "smollm2": "SmolLM2", "base": "base model", "best": "fine-tuned"},
    "zh": {"tiny": "內附模型", "smollm2": "SmolLM2", "base": "未微調", "best": "微調後"},
}
DIRECTIONS = {"en": {"m2c": "to Classical", "c2m": "to modern"}, "zh": {"m2c": "白話→文言", "c2m": "文言→白話"}}
# Experiments with a table of their cases, and the heading of the setting.
COMPARISONS = {
    "schedule": {"en": "schedule, steps", "zh": "排程、步數"},
    "rows_per_step": {"en": "rows per step", "zh": "每步筆數"},
    "data": {"en": "training rows", "zh": "訓練筆數"},
    "precision": {"en": "weights of the base model", "zh": "基礎模型的權重"},
    "prompt": {"en": "prompt, in training and in scoring", "zh": "訓練和評分用的 prompt"},
}
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, "==": operator.eq
}  # fmt: skip


@cache
def _read_text() -> dict[str, dict[str, Any]]:
    return yaml.safe_load((REPOSITORY / FOLDER / "text.yaml").read_text(encoding="utf-8"))


def text(section: str, language: str) -> str:
    """Return the sentences of a section, with the values of the records.

    Raises:
        ValueError: The values contradict the sentences.
    """
    values = compute_values()
    check_claims(section, _read_text()[section].get("claims", []), values)
    sentences = _read_text()[section][language]
    if isinstance(sentences, list):
        return "\n".join(_fill_lines(f"- {item}", language, values, indent="  ") for item in sentences)
    return _fill_lines(sentences, language, values)


def check_claims(section: str, claims: Sequence[str], values: dict[str, Any]) -> None:
    """Raise `ValueError` if a claim does not hold. A claim is a comparison such as `{a} < {b} < 0`."""
    for claim in claims:
        parts = re.split(r" (<=|<|>|==) ", claim)
        terms = [term.format(**values) for term in parts[::2]]
        for (left, right), symbol in zip(pairwise(terms), parts[1::2], strict=True):
            if not OPERATORS[symbol](*([left, right] if symbol == "==" else [float(left), float(right)])):
                raise ValueError(f"{FOLDER}/text.yaml: {section} is no longer true: {claim} is {left} {symbol} {right}")


def _fill_lines(template: str, language: str, values: dict[str, Any], indent: str = "") -> str:
    filled = template.strip().format(**values)
    if language == "zh":
        # YAML joins lines by spaces, which Chinese does not have between characters.
        return re.sub(rf"(?<={_CHINESE}) (?={_CHINESE})|(?<={_PUNCTUATION}) | (?={_PUNCTUATION})", "", filled)
    return textwrap.fill(filled, LINE_WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _answered(study: Study) -> list[str]:
    """Return the models whose run with prompts, few-shot examples and predictions is finished."""
    return [model.name for model in study.models if study.select(model.name, "questions")]


def scores(language: str) -> str:
    """Scores of the base models, the published study's settings, the recipes and the best of the grid."""
    study, names = load_study(), NAMES[language]
    headings = {
        "en": ("", "settings", "steps", "seeds", "mean perplexity [95 %]", "best step", "last step"),
        "zh": ("", "設定", "步數", "種子數", "平均困惑度 [95 %]", "最佳步數", "最後一步"),
    }
    titles = {
        "en": ("published study", "recipe", "recipe without NF4", "best of the grid"),
        "zh": ("原研究", "recipe", "recipe，不用 NF4", "網格中最好的"),
    }[language]
    colon = ": " if language == "en" else "："
    rows = []
    for model in (model.name for model in study.models):
        label = names[model]
        for entry in study.entries(model, "base"):
            if entry.get("prompt") == "study":
                low, high = entry["ci95"]
                score = f"{entry['mean_perplexity']:.2f} [{low:.2f}, {high:.2f}]"
                rows.append((label, names["base"], "", "", score, "", ""))
                label = ""
        best = study.cases(model, "settings", *SETTINGS_KEYS)[study.best_case(model, "settings", *SETTINGS_KEYS)]
        for title, runs in zip(
            titles, (*(study.select(model, name) for name in ("study", "recipe", "unquantized")), best), strict=True
        ):
            if runs:
                case = study.describe(runs)
                setting = name_setting(tuple(study.value(runs[0], key) for key in SETTINGS_KEYS))
                schedule = study.value(runs[0], SCHEDULE_KEYS[0])
                counts = (f"{runs[0]['steps']:,}", len(runs))
                step, last = f"{case.best_step:,.0f}", f"{case.last:.2f}"
                rows.append((label, f"{title}{colon}{schedule} {setting}", *counts, case.score, step, last))
                label = ""
    return format_table(headings[language], rows)


def few_shot(language: str) -> str:
    """Scores with few-shot examples, of the base models and fine-tuned; of SmolLM2, those of `make shots`."""
    study, names = load_study(), NAMES[language]
    sources = {"en": {"prompt": "the prompt's", "train": "drawn"}, "zh": {"prompt": "prompt 內附", "train": "抽樣"}}
    separator = ", " if language == "en" else "，"
    columns = {
        f"{names['tiny']}{separator}{names[name]}": few_shot_scores(study, "tiny", name) for name in ("base", "best")
    }
    published = compute_values()["published"]["smollm2"]["base"]
    columns[f"{names['smollm2']}{separator}{names['base']}"] = {
        ("prompt", shots): Spread([score]) for shots, score in published.items()
    }
    rows = []
    for source, shots in next(iter(columns.values())):
        label = f"{shots}{separator}{sources[language][source]}" if shots else "0"
        found = [column.get((source, shots)) for column in columns.values()]
        rows.append((label, *("" if spread is None else spread.text for spread in found)))
    return format_table(({"en": "few-shot examples", "zh": "few-shot 範例"}[language], *columns), rows)


def comparison(experiment: str, language: str) -> str:
    """The cases of an experiment: their scores, and the differences from the reference."""
    study, names = load_study(), NAMES[language]
    headings = {
        "en": ("seeds", "best step", "mean perplexity [95 %]", "difference [95 %]"),
        "zh": ("種子數", "最佳步數", "平均困惑度 [95 %]", "差距 [95 %]"),
    }
    rows = []
    for model in (model.name for model in study.models if study.select(model.name, experiment)):
        for number, (name, case) in enumerate(sort_cases(experiment, study.compare(model, experiment))):
            label = "" if number else names[model]
            rows.append((label, name, len(case.runs), f"{case.best_step:,.0f}", case.score, case.change or "–"))
    return format_table(("", COMPARISONS[experiment][language], *headings[language]), rows)


def directions(language: str) -> str:
    """BLEU and chrF by direction on data/eval.json, beside copying the input."""
    study, names = load_study(), NAMES[language]
    copying = {"en": "copying the input", "zh": "照抄輸入"}[language]
    rows = []
    for model in _answered(study):
        predictions = study.predictions(model)
        for direction, title in DIRECTIONS[language].items():
            groups = [predictions["copying sample"], *(predictions[name]["metrics"] for name in ("base", "best"))]
            cells = [f"{group[direction]['bleu']:.1f} / {group[direction]['chrf']:.1f}" for group in groups]
            rows.append((names[model] if direction == "m2c" else "", title, *cells))
    return format_table(("", "BLEU / chrF", copying, names["base"], names["best"]), rows)


def outputs(language: str) -> str:
    """Outputs of the models for sample rows, side by side."""
    study, names = load_study(), NAMES[language]
    rows_by_id = {row["id"]: row for row in read_json("data/eval.json")}
    separator = ", " if language == "en" else "，"
    parts = []
    for row_id in read_errors()["side_by_side"]:
        row = rows_by_id[row_id]
        lines = [({"en": "reference", "zh": "參考答案"}[language], row["output"])]
        for model in _answered(study):
            for name in ("base", "best"):
                output = study.predictions(model)[name]["outputs"][row_id]
                lines.append((f"{names[model]}{separator}{names[name]}", _shorten(output)))
        parts.append(format_table((f"`{row_id}`", _shorten(row["instruction"])), lines))
    return "\n\n".join(parts)


def _shorten(output: str, characters: int = 60) -> str:
    line = re.sub(r"\s*\n\s*", " ⏎ ", output.strip()).replace("|", "\\|")
    return line if len(line) <= characters else f"{line[:characters]}…"


def errors(language: str) -> str:
    """Errors in the outputs that were read, by kind, model and direction."""
    names, counts = NAMES[language], compute_values()["errors"]
    separator = ", " if language == "en" else "，"
    columns = {
        f"{names[model]}{separator}{title}": found[direction]
        for model, found in counts.items()
        for direction, title in DIRECTIONS[language].items()
    }
    kinds = {"none": {"en": "no error", "zh": "沒有錯誤"}, **read_errors()["kinds"]}
    rows = [(title[language], *(column[kind] or "" for column in columns.values())) for kind, title in kinds.items()]
    return format_table(({"en": "error", "zh": "錯誤"}[language], *columns), rows)


def cost(language: str) -> str:
    """Runs, steps and minutes of each experiment of the plan."""
    study, names = load_study(), NAMES[language]
    headings = {
        "en": ("experiment", "model", "runs", "of the plan's", "steps", "minutes of one process"),
        "zh": ("實驗", "模型", "次數", "計畫次數", "步數", "單一程序的分鐘數"),
    }
    finished = {run["id"]: run for run in study.runs}
    groups: dict[tuple[str, str], list[Record | None]] = {}
    for run in study.plan.runs:
        groups.setdefault((run.experiments[0], run.model.name), []).append(finished.get(run.id))
    rows = []
    for (experiment, model), planned in groups.items():
        runs = [run for run in planned if run is not None]
        minutes = sum(sum(run["seconds"].values()) for run in runs) / 60
        steps = sum(run["steps"] for run in runs)
        rows.append((f"`{experiment}`", names[model], len(runs), len(planned), f"{steps:,}", f"{minutes:.1f}"))
    return format_table(headings[language], rows)


TABLES: dict[str, Callable[[str], str]] = {
    "scores": scores,
    "few_shot_table": few_shot,
    "directions": directions,
    "outputs": outputs,
    "errors": errors,
    "cost": cost,
    **{f"{experiment}_table": partial(comparison, experiment) for experiment in COMPARISONS},
}


def list_blocks(language: str) -> dict[str, Callable[[], str]]:
    """Return the blocks of the page in a language, by name."""
    blocks = {f"study_{name}_{language}": partial(table, language) for name, table in TABLES.items()}
    return blocks | {f"study_{name}_{language}": partial(text, name, language) for name in _read_text()}
