"""Run folders with known numbers, written as the commands write them, and a parser for the page of a report."""

import hashlib
import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import yaml

from hw3.config.recipe import load_recipe
from hw3.data.fingerprint import DatasetFingerprint
from hw3.evaluation.perplexity import RowScore
from hw3.evaluation.results import EvalResults
from hw3.runs.checkpoints import mark_complete
from hw3.runs.manifest import Manifest
from hw3.runs.prediction_record import PredictionRecord, TranslationMetrics
from hw3.runs.results_file import GroupScore, PromptReference, RowContribution, ScoreEntry, ScoringSettings
from hw3.runs.run import Run

STARTED = "2026-01-02T03:04:05+00:00"
VOID_TAGS = {"meta", "input", "br", "img"}
# Perplexity of every row by entry label: the means are 30, 12, 6 and 7.5.
PERPLEXITIES = {
    "base": [8.0, 16.0, 32.0, 64.0],
    "base+2": [8.0, 8.0, 16.0, 16.0],
    "checkpoint-10": [4.0, 4.0, 8.0, 8.0],
    "checkpoint-20": [2.0, 4.0, 8.0, 16.0],
}


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def four_rows(marker: str = "") -> list[dict[str, str]]:
    """Return rows of both directions; `marker` is added to an id, an instruction and an output."""
    return [
        {"id": f"row-1{marker}", "instruction": f"今日無雨。{marker}\n翻譯成現代文：", "output": "今天沒有下雨。"},
        {"id": "row-2", "instruction": "今天沒有下雨。\n翻譯成文言文：", "output": "今日無雨。"},
        {"id": "row-3", "instruction": "翻譯成現代文：\n山高月小。", "output": f"山很高，月亮顯得小。{marker}"},
        {"id": "row-4", "instruction": "翻譯成文言文：\n山很高，月亮顯得小。", "output": "山高月小。"},
    ]


def write_run(
    run: Path,
    *,
    base: str = "data/tiny",
    tokenizer: str = "t1",
    learning_rate: float = 0.001,
    labels: tuple[str, ...] = tuple(PERPLEXITIES),
    is_trained: bool = True,
    marker: str = "",
) -> Path:
    """Write a run folder, and its data files to `data/`.

    Args:
        run: the run folder.
        base: name and hash of the base model.
        tokenizer: hash of the tokenizer.
        learning_rate: the recipe's learning rate.
        labels: labels of the entries that are scored.
        is_trained: whether there are a manifest and checkpoints.
        marker: text that is added to rows and prompt.
    """
    data = write_json(Path("data/eval.json"), four_rows(marker))
    train = write_json(Path("data/train.json"), [{"id": "t", "instruction": "甲\n翻譯成現代文：", "output": "乙"}])
    recipe = {
        "model": {"pretrained_model_name_or_path": base, "dtype": "float32"},
        "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "prompt": {
            "system": f"你是翻譯。{marker}",
            "turn": "問：{instruction}\n\n\n答：",
            "examples": [
                {"instruction": "天雨。\n翻譯成現代文：", "output": "下雨了。"},
                {"instruction": "下雨了。\n翻譯成文言文：", "output": f"天雨。{marker}"},
            ],
        },
        "data": {"train": str(train), "eval": str(data)},
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "max_steps": 20,
            "learning_rate": learning_rate,
            "use_cpu": True,
            "bf16": False,
        },
    }
    run.mkdir(parents=True)
    write_recipe(run, recipe)
    prompt_sha256 = load_recipe(run / "recipe.yaml").prompt.sha256
    if is_trained:
        _write_training(run, base, prompt_sha256, {"train": train, "eval": data})
    settings = ScoringSettings(
        dtype="float32", attn_implementation="eager", quantization=None, dequantized=True, base_sha256=base,
        tokenizer_sha256=tokenizer, bootstrap_samples=200, bootstrap_seed=0,
    )  # fmt: skip
    results = EvalResults(
        run / "eval/eval",
        run_name=run.as_posix(),
        started=STARTED if is_trained else None,
        data=DatasetFingerprint(path=data.as_posix(), sha256=sha256(data), rows=4),
        settings=settings,
        prompt_sha256=prompt_sha256,
    )
    for label in labels:
        results.add(make_entry(label, prompt_sha256), _row_scores(label, four_rows(marker)))
    return run


def write_recipe(run: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe of a run."""
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")


def make_entry(label: str, prompt_sha256: str) -> ScoreEntry:
    """Return the entry with a label. Its interval is the mean ± 2."""
    stem, _, shots = label.partition("+")
    checkpoint = None if stem == "base" else stem
    mean = sum(PERPLEXITIES[label]) / 4
    to_classical = GroupScore(mean_perplexity=mean + 0.25, token_perplexity=1.0, rows=2, tokens=10)
    to_modern = to_classical.model_copy(update={"mean_perplexity": mean - 0.25})
    return ScoreEntry(
        key=label,
        step=int(stem.partition("-")[2] or 0),
        checkpoint=checkpoint,
        shots=int(shots or 0),
        prompt=PromptReference(name="recipe", sha256=prompt_sha256),
        example_ids=None,
        adapter_sha256=checkpoint,
        mean_perplexity=mean,
        mean_perplexity_ci95=(mean - 2, mean + 2),
        token_perplexity=5.5,
        median_perplexity=5.25,
        bits_per_character=mean / 4,
        rows=4,
        tokens=31,
        unknown_tokens=0,
        by_direction={"m2c": to_classical, "c2m": to_modern},
        by_length={"1-10": to_classical},
        top_contributors=[RowContribution(id="row-4", perplexity=8.0, share=1 / 3, tokens=6)],
        seconds=1.5,
    )


def _row_scores(label: str, rows: list[dict[str, str]]) -> list[RowScore]:
    scores = []
    for row, perplexity in zip(rows, PERPLEXITIES[label], strict=True):
        tokens = len(row["output"]) + 1
        scores.append(RowScore(row["id"], tokens * math.log(perplexity), tokens, tokens - 1))
    return scores


def _write_training(run: Path, base: str, prompt_sha256: str, files: dict[str, Path]) -> None:
    """Write a manifest with two sessions on two GPUs, and the checkpoints of steps 10 and 20."""
    manifest = {
        "schema": 1, "name": run.name, "started": STARTED, "versions": {"torch": "2.13.0"},
        "python": "3.11.7", "git_commit": "abc123",
        "data": {key: {"path": str(path), "sha256": sha256(path), "rows": 120} for key, path in files.items()},
        "prompt_sha256": prompt_sha256, "quantization": None, "base": {"name": base, "sha256": "b"},
        "tokenizer_sha256": "t", "tokens": {"bos": 2, "eos": 1, "pad": 0}, "device": "NVIDIA H200",
        "layout": {"processes": 2, "rows_per_device": 1, "accumulation": 3},
        "speed": {"requested": "auto", "cuda_graphs": True, "dequantized": True, "activation_checkpointing": False,
                  "optim": "adamw_torch"},
        "parameters": {"trained": 1000, "total": 50000},
        "sessions": [
            {"started": STARTED, "seconds": 40.0, "from_step": 0, "to_step": 10, "processes": 2, "peak_gib": 3.25},
            {"started": "2026-01-02T04:04:05+00:00", "seconds": 50.4, "from_step": 10, "to_step": 20, "processes": 2,
             "peak_gib": 3.5},
        ],
    }  # fmt: skip
    Manifest.model_validate(manifest).write(run / "manifest.json")
    for step in (10, 20):
        folder = run / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"0" * 2**20)
        log_history = [{"step": 5, "loss": 2.0}, {"step": step, "loss": 1.0}]
        write_json(folder / "trainer_state.json", {"log_history": log_history, "num_input_tokens_seen": 4321})
        mark_complete(folder, step)


def write_predictions(run: Path, name: str, outputs: list[str], data: Path = Path("data/eval.json")) -> None:
    """Write predictions and their record, as `hw3 predict` does."""
    rows = read_json(data)
    predictions = [{"id": row["id"], "output": output} for row, output in zip(rows, outputs, strict=True)]
    file = write_json(run / f"predictions/eval/{name}.json", predictions)

    def metrics(rows: int = 4, bleu: float = 27.84) -> TranslationMetrics:
        return TranslationMetrics(
            rows=rows, bleu=bleu, chrf=27.42, exact_match=0.25, copy_rate=0.5, length_ratio=1.1, unfinished=0.0
        )

    checkpoint, _, shots = name.partition("+")
    adapters = {f"checkpoint-{step}": adapter_sha256(run, step) for step in (10, 20)}
    PredictionRecord(
        key="k", run=run.as_posix(), data=DatasetFingerprint(path=str(data), sha256=sha256(data), rows=4), name=name,
        checkpoint=None if checkpoint == "base" else checkpoint, adapter_sha256=adapters.get(checkpoint),
        shots=int(shots or 0), prompt=PromptReference(name="recipe", sha256="p"), generation={"max_new_tokens": 64},
        seconds=8.0, rows_per_second=0.5, unfinished_ids=[], predictions_sha256=sha256(file),
        groups={"all": metrics(), "m2c": metrics(rows=2, bleu=30.0)}, copy_input={"all": metrics(bleu=18.2)},
    ).write(run / f"predictions/eval/{name}.quality.json")  # fmt: skip


def adapter_sha256(run: Path, step: int) -> str | None:
    """Return the hash of a checkpoint's weights; None if there is no such checkpoint."""
    return next((checkpoint.sha256 for checkpoint in Run(run).complete_checkpoints() if checkpoint.step == step), None)


class Page(HTMLParser):
    """A parsed page. Parsing fails unless every opened element is closed in order.

    Attributes:
        tags: all elements with their attributes.
        tables: cells by table title.
        texts: texts of all elements by tag.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, list[str]] = {}
        self._open_texts: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in VOID_TAGS:
            return
        self.open_tags.append(tag)
        self._open_texts.append([])
        if tag == "table":
            self._rows: list[list[str]] = []
        if tag == "tr":
            self._rows.append([])

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag
        text = "".join(self._open_texts.pop())
        self.texts.setdefault(tag, []).append(text)
        if tag in ("td", "th"):
            self._rows[-1].append(text)
        if tag == "caption":
            self._title = text
        if tag == "table":
            self.tables[self._title] = self._rows

    def handle_data(self, data: str) -> None:
        for texts in self._open_texts:
            texts.append(data)

    @property
    def body(self) -> str:
        """The text of the page."""
        return self.texts["body"][0]

    @property
    def facts(self) -> dict[str, str]:
        """All pairs of name and value."""
        return dict(zip(self.texts["dt"], self.texts["dd"], strict=True))

    @property
    def commands(self) -> list[str]:
        """The commands that reproduce the runs."""
        return next(code for code in self.texts["code"] if code.startswith("accelerate launch")).splitlines()

    def table(self, title: str) -> list[list[str]]:
        """Return the cells of the only table whose title starts like this."""
        (found,) = [rows for name, rows in self.tables.items() if name.startswith(title)]
        return found


class SampleReport(NamedTuple):
    """A report.

    Attributes:
        folder: the working directory of the command that wrote it.
        page: the HTML page.
        markdown: the Markdown file.
    """

    folder: Path
    page: Page
    markdown: str


def write_and_read_report(*runs: Path, output: Path | None = None, options: Sequence[str] = ()) -> tuple[Page, str]:
    """Run `hw3 report`; return its page and its Markdown."""
    helpers.hw3("report", *runs, *(["--output", output] if output else []), *options)
    html, markdown = ((((output or runs[0]) / f"report.{kind}").read_text(encoding="utf-8")) for kind in ("html", "md"))
    return Page(html), markdown
