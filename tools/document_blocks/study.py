"""Blocks of docs/study.md, in English and in Traditional Chinese: tables, and sentences with values of result files.

The sentences are in docs/study/text.yaml. A name in braces is a value of `compute_values`.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import yaml
from matplotlib.figure import Figure
from study.figures import FewShotScores, draw_prompting
from study.plan import read_plan

from document_blocks.sources import REPOSITORY, format_table, read_json

FOLDER = "docs/study"
LINE_WIDTH = 128
_CHINESE, _PUNCTUATION = "[\u3000-\u9fff\uff00-\uffef]", "[，。；：、（）「」]"
BASE, BEST = {"en": "base model", "zh": "未微調"}, {"en": "fine-tuned", "zh": "微調後"}
# Name, folder of `results.json`, and what it is.
RUNS = {
    "tiny": ("docs/tiny", {"en": "embedded model, sample rows", "zh": "內附模型，範例資料"}),
    "homework": ("docs/homework", {"en": "embedded model, course's rows", "zh": "內附模型，課程資料"}),
    "proper": ("docs/homework/proper", {"en": "the same in correct characters", "zh": "同上，正體字"}),
    "smollm2": ("docs/smollm2", {"en": "SmolLM2, course's rows", "zh": "SmolLM2，課程資料"}),
}

Entry = dict[str, Any]


@cache
def _read_text() -> dict[str, dict[str, str]]:
    return yaml.safe_load((REPOSITORY / FOLDER / "text.yaml").read_text(encoding="utf-8"))


def text(section: str, language: str) -> str:
    """Return the sentences of a section, with the values of the result files."""
    filled = _read_text()[section][language].strip().format(**compute_values())
    if language == "zh":
        # YAML joins lines by spaces, which Chinese does not have between characters.
        return re.sub(rf"(?<={_CHINESE}) (?={_CHINESE})|(?<={_PUNCTUATION}) | (?={_PUNCTUATION})", "", filled)
    return textwrap.fill(filled, LINE_WIDTH, break_long_words=False, break_on_hyphens=False)


# --- values -----------------------------------------------------------------------------------------------------------


@cache
def compute_values() -> dict[str, str]:
    """Return every value that the sentences may name."""
    values = {}
    for name in RUNS:
        values |= _run_values(name)
    for number, row in enumerate(read_json("docs/smollm2/settings.json")["rows"], 1):
        values[f"smollm2_setting_{number}"] = f"{row['best_mean_perplexity']:.2f}"
    for (model, source, shots), entry in _few_shot_entries().items():
        values[f"{model}_{source}_{shots}"] = f"{entry['mean_perplexity']:.2f}"
    for model, entries in (("base", _prompt_entries("base")), ("best", _prompt_entries("best"))):
        ordered = sorted(entries, key=lambda name: entries[name]["mean_perplexity"])
        for position, name in (("lowest", ordered[0]), ("highest", ordered[-1])):
            values[f"prompts_{model}_{position}"] = f"{entries[name]['mean_perplexity']:.2f}"
            values[f"prompts_{model}_{position}_name"] = name
    return values | _search_values() | _reading_values() | _plan_values()


def _plan_values() -> dict[str, str]:
    """Return how many runs the plan of the larger study has."""
    plan = read_plan(REPOSITORY / "docs/study/plan.yaml")
    grid = [run for run in plan.runs if run.model.name == "tiny" and "settings" in run.experiments]
    settings = {str(sorted(run.settings.items())) for run in grid}
    counts = Counter(run.model.name for run in plan.runs)
    return {
        **{f"planned_{name}": str(count) for name, count in counts.items()},
        "planned_settings": str(len(settings)),
        "planned_seeds": str(len({run.seed for run in grid})),
    }


def _curve(name: str) -> list[Entry]:
    """Return the zero-shot entries of a run's checkpoints, by step."""
    entries = read_json(f"{RUNS[name][0]}/results.json")["entries"]
    return sorted((entry for entry in entries if entry["step"] and not entry["shots"]), key=lambda e: e["step"])


def _select(name: str) -> tuple[Entry, Entry]:
    """Return the checkpoints of a run with the lowest mean perplexity and the lowest token perplexity."""
    curve = _curve(name)
    by_mean, by_token = (min(curve, key=lambda e: e[key]) for key in ("mean_perplexity", "token_perplexity"))
    return by_mean, by_token


def _format(entry: Entry) -> str:
    low, high = entry["mean_perplexity_ci95"]
    return f"{entry['mean_perplexity']:.2f} [{low:.2f}, {high:.2f}]"


def _run_values(name: str) -> dict[str, str]:
    entries = read_json(f"{RUNS[name][0]}/results.json")["entries"]
    base = {entry["shots"]: entry for entry in entries if entry["checkpoint"] is None}
    last, (best, by_token) = _curve(name)[-1], _select(name)
    return {
        **{f"{name}_base_{shots}": f"{entry['mean_perplexity']:.2f}" for shots, entry in base.items()},
        f"{name}_best": f"{best['mean_perplexity']:.2f}",
        f"{name}_best_ci": _format(best),
        f"{name}_best_step": f"{best['step']:,}",
        f"{name}_last": f"{last['mean_perplexity']:.2f}",
        f"{name}_last_step": f"{last['step']:,}",
        f"{name}_by_token_cost": f"{by_token['mean_perplexity'] / best['mean_perplexity'] - 1:.1%}",
    }


def _study_entries(model: str) -> list[Entry]:
    """Return the scores of the embedded model in docs/study/results.json: `base` or `best`."""
    results = read_json(f"{FOLDER}/results.json")
    step = 0 if model == "base" else results["best"]["step"]
    return [entry for entry in results["entries"] if entry["step"] == step]


def _few_shot_entries() -> dict[tuple[str, str, int], Entry]:
    """Return the scores under the study's prompt by (model, source of the examples, number of examples)."""
    return {
        (model, "prompt" if entry["example_ids"] is None else "drawn", entry["shots"]): entry
        for model in ("base", "best")
        for entry in _study_entries(model)
        if entry["prompt"]["name"] == "study"
    }


def _prompt_entries(model: str) -> dict[str, Entry]:
    return {entry["prompt"]["name"]: entry for entry in _study_entries(model) if not entry["shots"]}


def _search_values() -> dict[str, str]:
    record = read_json("docs/search/tiny.json")
    importances = {key.split("/")[-1]: value for key, value in record["importances"].items()}
    values = {f"importance_{key.split('.')[-1]}": f"{value:.0%}" for key, value in importances.items()}
    return values | {"trials": str(len(record["trials"])), "trial_steps": str(record["max_steps"])}


def _reading_values() -> dict[str, str]:
    rows = read_json(f"{FOLDER}/reading.json")["kinds"]
    return {"read": str(len(rows)), "read_correct": str(sum(not kinds for kinds in rows.values()))}


def draw_prompting_figure() -> Figure:
    """Draw the scores of the tables with few-shot examples and prompts."""
    few_shot_scores: dict[str, FewShotScores] = {"base": {}, "best": {}}
    for (model, source, shots), entry in _few_shot_entries().items():
        key = "train" if source == "drawn" else "prompt"
        few_shot_scores[model].setdefault(key, []).append((shots, entry["mean_perplexity"]))
    prompt_scores = [
        {name: (e["mean_perplexity"], e["mean_perplexity_ci95"]) for name, e in _prompt_entries(model).items()}
        for model in ("base", "best")
    ]
    return draw_prompting((few_shot_scores["base"], few_shot_scores["best"]), (prompt_scores[0], prompt_scores[1]))


# --- tables -----------------------------------------------------------------------------------------------------------


def few_shot(language: str) -> str:
    """Scores with few-shot examples, of the embedded model, and of SmolLM2's base."""
    entries = _few_shot_entries()
    sources = {"prompt": {"en": "the prompt's", "zh": "prompt 內附"}, "drawn": {"en": "drawn", "zh": "抽樣"}}
    smollm2 = {
        entry["shots"]: entry
        for entry in read_json("docs/smollm2/results.json")["entries"]
        if entry["checkpoint"] is None
    }
    rows = []
    for source, shots in sorted({(source, shots) for _, source, shots in entries}, key=lambda k: (k[0] == "drawn", k)):
        label = f"{shots}, {sources[source][language]}" if shots else "0"
        cells = [entries.get((model, source, shots)) for model in ("base", "best")]
        cells.append(smollm2.get(shots) if source == "prompt" else None)
        rows.append((label, *("" if entry is None else _format(entry) for entry in cells)))
    headings = {
        "en": ("few-shot examples", "embedded model", "embedded model, fine-tuned", "SmolLM2"),
        "zh": ("few-shot 範例", "內附模型", "內附模型，微調後", "SmolLM2"),
    }
    return format_table(headings[language], rows)


def prompts(language: str) -> str:
    """Scores of the embedded model with each prompt."""
    base, best = _prompt_entries("base"), _prompt_entries("best")
    names = sorted(best, key=lambda name: best[name]["mean_perplexity"])
    rows = [(f"`{name}`", _format(base[name]), _format(best[name])) for name in names]
    return format_table(("prompt", BASE[language], BEST[language]), rows)


def selection(language: str) -> str:
    """The checkpoints that mean perplexity and token perplexity select, in the runs of this repository."""
    rows = []
    for name, (_, title) in RUNS.items():
        by_mean, by_token = _select(name)
        cost = f"{by_token['mean_perplexity'] / by_mean['mean_perplexity'] - 1:.1%}"
        cells = [f"{entry['step']:,} ({entry['mean_perplexity']:.2f})" for entry in (by_mean, by_token)]
        rows.append((title[language], len(_curve(name)), *cells, cost))
    headings = {
        "en": ("run", "checkpoints", "lowest mean perplexity: step", "lowest token perplexity: step", "cost"),
        "zh": ("訓練", "檢查點數", "平均困惑度最低：步數", "token 困惑度最低：步數", "代價"),
    }
    return format_table(headings[language], rows)


def directions(language: str) -> str:
    """BLEU and chrF by direction, beside copying the input."""
    base, best = (read_json(f"{FOLDER}/predictions/{name}.quality.json") for name in ("base", "best"))
    titles = {"m2c": {"en": "to Classical", "zh": "白話→文言"}, "c2m": {"en": "to modern", "zh": "文言→白話"}}
    rows = []
    for direction, title in titles.items():
        groups = (base["copy_input"], base["groups"], best["groups"])
        cells = [f"{group[direction]['bleu']:.1f} / {group[direction]['chrf']:.1f}" for group in groups]
        rows.append((title[language], *cells))
    copying = {"en": "copying the input", "zh": "照抄輸入"}[language]
    return format_table(("BLEU / chrF", copying, BASE[language], BEST[language]), rows)


def outputs(language: str) -> str:
    """Outputs of the embedded model for sample rows, side by side."""
    rows_by_id = {row["id"]: row for row in read_json("data/eval.json")}
    predictions = {
        name: {row["id"]: row["output"] for row in read_json(f"{FOLDER}/predictions/{name}.json")}
        for name in ("base", "best")
    }
    parts = []
    for row_id in read_json(f"{FOLDER}/reading.json")["side_by_side"]:
        row = rows_by_id[row_id]
        lines = [
            ({"en": "reference", "zh": "參考答案"}[language], row["output"]),
            (BASE[language], _shorten(predictions["base"][row_id])),
            (BEST[language], _shorten(predictions["best"][row_id])),
        ]
        parts.append(format_table((f"`{row_id}`", _shorten(row["instruction"])), lines))
    return "\n\n".join(parts)


def _shorten(output: str, characters: int = 80) -> str:
    line = output.replace("\n", " ⏎ ").replace("|", "\\|")
    return line if len(line) <= characters else f"{line[:characters]}…"


def errors(language: str) -> str:
    """Errors in the outputs that were read, by kind and direction."""
    reading = read_json(f"{FOLDER}/reading.json")
    counts = {"m2c": Counter(), "c2m": Counter()}
    for row_id, kinds in reading["kinds"].items():
        counts[row_id[-3:]].update(kinds)
    headings = {"en": ("error", "to Classical", "to modern"), "zh": ("錯誤", "白話→文言", "文言→白話")}[language]
    rows = [
        (title[language], *(count[kind] or "" for count in counts.values()))
        for kind, title in reading["titles"].items()
    ]
    return format_table(headings, rows)


TABLES = {
    "few_shot_table": few_shot,
    "prompts_table": prompts,
    "selection_table": selection,
    "directions": directions,
    "outputs": outputs,
    "errors": errors,
}


def list_blocks(language: str) -> dict[str, Callable[[], str]]:
    """Return the blocks of the page in a language, by name."""
    blocks = {f"study_{name}_{language}": partial(table, language) for name, table in TABLES.items()}
    return blocks | {f"study_{name}_{language}": partial(text, name, language) for name in _read_text()}
