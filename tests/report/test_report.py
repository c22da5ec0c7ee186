"""`hw3 report` on run folders written here: figures in their cells, hostile text, several runs, missing parts."""

import base64
import contextlib
import hashlib
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hw3.cli import main
from hw3.config.recipe import load_recipe
from hw3.evaluation.results import _SCHEMA
from hw3.report.predictions import evenly, marked
from hw3.report.render import fence, markdown, visible

HOSTILE = "<script>alert(1)</script></script>{{7*7}}{% raw %}\"'`|](javascript:x)<!--\u202eevil"
SHOWN = HOSTILE.replace("\u202e", "\\u202e")
VOID = {"meta", "input", "br", "img"}
# Perplexity of every row by entry name: means 30, 12, 6 and 7.5.
PERPLEXITIES = {
    "base": [8.0, 16.0, 32.0, 64.0],
    "base+2": [8.0, 8.0, 16.0, 16.0],
    "checkpoint-10": [4.0, 4.0, 8.0, 8.0],
    "checkpoint-20": [2.0, 4.0, 8.0, 16.0],
}


def hw3(*words: str | Path, expected: int = 0) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main([str(word) for word in words])
    assert status == expected, out.getvalue()
    return out.getvalue()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def four_rows(marker: str = "") -> list[dict[str, str]]:
    return [
        {"id": f"row-1{marker}", "instruction": f"今日無雨。{marker}\n翻譯成現代文：", "output": "今天沒有下雨。"},
        {"id": "row-2", "instruction": "今天沒有下雨。\n翻譯成文言文：", "output": "今日無雨。"},
        {"id": "row-3", "instruction": "翻譯成現代文：\n山高月小。", "output": f"山很高，月亮顯得小。{marker}"},
        {"id": "row-4", "instruction": "翻譯成文言文：\n山很高，月亮顯得小。", "output": "山高月小。"},
    ]


def make_run(
    run: Path,
    *,
    base: str = "data/tiny",
    tokenizer: str = "t1",
    learning_rate: float = 0.001,
    names: tuple[str, ...] = tuple(PERPLEXITIES),
    trained: bool = True,
    marker: str = "",
) -> Path:
    """A run folder as the commands write it, with figures known beforehand; the data files lie in `data/`."""
    data = write(Path("data/eval.json"), four_rows(marker))
    train = write(Path("data/train.json"), [{"id": "t", "instruction": "甲\n翻譯成現代文：", "output": "乙"}] * 1)
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
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    prompt = load_recipe(run / "recipe.yaml").prompt.sha256
    if trained:
        write_training(run, base, prompt, {"train": train, "eval": data})
    entries, rows = [], []
    for name in names:
        entries.append(entry(name, prompt))
        for row, perplexity in zip(four_rows(marker), PERPLEXITIES[name], strict=True):
            tokens = len(row["output"]) + 1
            rows.append((name, row["id"], tokens * math.log(perplexity), tokens, tokens - 1, perplexity))
    if entries:
        head = {"schema": 1, "run": run.as_posix(), "started": "2026-01-02T03:04:05+00:00" if trained else None}
        head["data"] = {"path": data.as_posix(), "sha256": sha256(data), "rows": 4}
        head["settings"] = {
            "dtype": "float32", "attn_implementation": "eager", "quantization": None, "dequantized": True,
            "base_sha256": base, "tokenizer_sha256": tokenizer, "bootstrap_samples": 200, "bootstrap_seed": 0,
        }  # fmt: skip
        write(run / "eval/eval/results.json", head | {"entries": entries, "best": None})
        columns = [
            pa.array(list(column), kind) for column, kind in zip(zip(*rows, strict=True), _SCHEMA.types, strict=True)
        ]
        pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), run / "eval/eval/rows.parquet")
    return run


def write_training(run: Path, base: str, prompt: str, files: dict[str, Path]) -> None:
    known = {key: {"path": str(path), "sha256": sha256(path), "rows": 120} for key, path in files.items()}
    manifest = {
        "schema": 1, "name": run.name, "started": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"},
        "python": "3.11.7", "git_commit": "abc123", "data": known, "prompt_sha256": prompt, "quantization": None,
        "base": {"name": base, "sha256": "b"}, "tokenizer_sha256": "t", "tokens": {}, "device": "NVIDIA H200",
        "layout": {"processes": 2, "rows_per_device": 1, "accumulation": 3},
        "parameters": {"trained": 1000, "total": 50000},
        "sessions": [
            {"began": "2026-01-02T03:04:05+00:00", "seconds": 40.0, "from_step": 0, "to_step": 10, "processes": 2,
             "peak_gib": 3.25},
            {"began": "2026-01-02T04:04:05+00:00", "seconds": 50.4, "from_step": 10, "to_step": 20, "processes": 2,
             "peak_gib": 3.5},
        ],
    }  # fmt: skip
    write(run / "manifest.json", manifest)
    for step in (10, 20):
        folder = run / f"checkpoint-{step}"
        (folder).mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"0" * 2**20)
        history = [{"step": 5, "loss": 2.0}, {"step": step, "loss": 1.0}]
        write(folder / "trainer_state.json", {"log_history": history, "num_input_tokens_seen": 4321})
        sizes = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in folder.iterdir()}
        write(folder / "COMPLETE.json", {"schema": 1, "step": step, "files": sizes, "resume_files": {}})


def entry(name: str, prompt: str) -> dict[str, Any]:
    """An entry of `results.json`; the interval is the mean's ± 2."""
    stem, _, shots = name.partition("+")
    mean = sum(PERPLEXITIES[name]) / 4
    group = {"mean_perplexity": mean + 0.25, "token_perplexity": 1.0, "rows": 2, "tokens": 10}
    return {
        "key": name,
        "step": int(stem.partition("-")[2] or 0),
        "checkpoint": None if stem == "base" else stem,
        "shots": int(shots or 0),
        "prompt": {"name": "recipe", "sha256": prompt},
        "example_ids": None,
        "adapter_sha256": None if stem == "base" else stem,
        "mean_perplexity": mean,
        "mean_perplexity_ci95": [mean - 2, mean + 2],
        "token_perplexity": 5.5,
        "median_perplexity": 5.25,
        "bits_per_character": mean / 4,
        "rows": 4,
        "tokens": 31,
        "unknown_tokens": 0,
        "by_direction": {"m2c": group, "c2m": group | {"mean_perplexity": mean - 0.25}},
        "by_length": {"1-10": group},
        "heaviest": [{"id": "row-4", "perplexity": 8.0, "share": 1 / 3, "tokens": 6}],
        "seconds": 1.5,
    }


def predict(run: Path, name: str, outputs: list[str], data: Path = Path("data/eval.json")) -> None:
    """Answers and their figures, as `hw3 predict` writes them."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    answers = [{"id": row["id"], "output": output} for row, output in zip(rows, outputs, strict=True)]
    file = write(run / f"predictions/eval/{name}.json", answers)
    figures = {"rows": 4, "bleu": 27.84, "chrf": 27.42, "exact_match": 0.25, "copy_rate": 0.5, "length_ratio": 1.1}
    figures["unfinished"] = 0.0
    stem, _, shots = name.partition("+")
    quality = {
        "schema": 1, "run": run.as_posix(), "data": {"path": str(data), "sha256": sha256(data), "rows": 4},
        "name": name, "checkpoint": None if stem == "base" else stem, "shots": int(shots or 0),
        "prompt": {"name": "recipe", "sha256": "p"}, "generation": {"max_new_tokens": 64}, "seconds": 8.0,
        "rows_per_second": 0.5, "predictions_sha256": sha256(file),
        "groups": {"all": figures, "m2c": figures | {"rows": 2, "bleu": 30.0}},
        "copy_input": {"all": figures | {"bleu": 18.2}},
    }  # fmt: skip
    write(run / f"predictions/eval/{name}.quality.json", quality)


class Page(HTMLParser):
    """A parsed page: that it is well formed, its tables by title, its texts, and everything that could act."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, list[str]] = {}
        self._at: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in VOID:
            return
        self.open.append(tag)
        self._at.append([])
        if tag == "table":
            self._rows: list[list[str]] = []
        if tag == "tr":
            self._rows.append([])

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        text = "".join(self._at.pop())
        self.texts.setdefault(tag, []).append(text)
        if tag in ("td", "th"):
            self._rows[-1].append(text)
        if tag == "caption":
            self._title = text
        if tag == "table":
            self.tables[self._title] = self._rows

    def handle_data(self, data: str) -> None:
        for texts in self._at:
            texts.append(data)

    def table(self, title: str) -> list[list[str]]:
        (found,) = [rows for name, rows in self.tables.items() if name.startswith(title)]
        return found


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def report(*runs: Path, words: tuple[str, ...] = ()) -> tuple[Page, str]:
    hw3("report", *runs, *words)
    folder = Path(words[1]) if words else runs[0]
    html, text = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    return Page(html), text


def test_figures_stand_in_their_cells() -> None:
    run = make_run(Path("outputs/a"))
    page, text = report(run)
    assert page.texts["h2"] == [
        "1. Data, tuning and the final score",
        "2. Zero-shot and few-shot, against LoRA",
        "3. A second, larger model",
        "Answers",
        "Record",
    ]
    checkpoints = page.table("Perplexity by checkpoint")
    assert [row[0] for row in checkpoints] == ["step", "10 (best)", "20"]
    assert checkpoints[1][2:] == ["6.00 [4.00, 8.00]", "5.25", "5.50", "1.500", "", ""]
    # Row by row −2, 0, 0, +8: a mean of 1.5, one row better, one worse.
    assert checkpoints[2][2] == "7.50 [5.50, 9.50]" and checkpoints[2][7] == "1 / 1"
    assert re.fullmatch(r"\+1\.50 \[−\d\.\d\d, \+\d\.\d\d\]", checkpoints[2][6])
    shots = page.table("Zero-shot, few-shot and tuned")
    assert [row[0] for row in shots[1:]] == ["un-tuned, zero-shot", "un-tuned, 2-shot", "checkpoint-10, zero-shot"]
    assert [row[2:5] for row in shots[1:]] == [
        ["30.00 [28.00, 32.00]", "30.25", "29.75"],
        ["12.00 [10.00, 14.00]", "12.25", "11.75"],
        ["6.00 [4.00, 8.00]", "6.25", "5.75"],
    ]
    assert [row[5].partition(" ")[0] for row in shots[1:]] == ["+24.00", "+6.00", ""]
    assert [row[6] for row in shots[1:]] == ["0 / 4", "0 / 4", ""]
    assert page.table("Files of rows")[1:] == [
        ["training", "data/train.json", sha256(Path("data/train.json"))[:12], "120"],
        ["score", "data/eval.json", sha256(Path("data/eval.json"))[:12], "120"],
    ]
    body = page.texts["body"][0]
    assert "20 optimizer steps of 6 rows are 120 rows, 4,321 tokens with their prompts: 1.0 times through" in body
    assert "LoRA adapters of rank 8" in body and "1,000 parameters beside the base's 50,000 (2.0 %)" in body
    assert "The first 2 of the 2 worked examples" in body and "None of them is among the scored rows." in body
    assert "lowers the un-tuned score by 18.00, from 30.00 to 12.00" in body
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts["rows a step"] == "2 × 3" and facts["learning rate"] == "0.001, linear"
    assert facts["training time"] == "90 s for 20 steps, in 2 sessions"
    assert facts["GPU memory, training"] == "3.50 GiB at most" and facts["device"] == "NVIDIA H200"
    assert facts["disk"] == "2.0 MiB for 2 checkpoints; 1.0 MiB of weights each"
    commands = next(code for code in page.texts["code"] if code.startswith("accelerate launch"))
    assert commands.splitlines() == [
        "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m hw3 train "
        "outputs/a/recipe.yaml --run outputs/a",
        "hw3 eval outputs/a",
        "hw3 eval outputs/a --base-only --shots 0 2",
        "hw3 report outputs/a",
    ]
    prompts = [code for code in page.texts["code"] if code.startswith("你是翻譯。")]
    assert prompts[0] == "你是翻譯。\n問：{instruction}\n\n\n答："
    assert "你是翻譯。\n問：{instruction}\n\n\n答：\n```\n" in text
    assert prompts[2].startswith("你是翻譯。\n問：天雨。\n翻譯成現代文：\n\n\n答：下雨了。\n\n問：下雨了。")
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    cells = [token.content for token in tokens if token.type == "inline"]
    at = cells.index("checkpoint-10, zero-shot")
    assert cells[at + 1 : at + 4] == ["6.00 [4.00, 8.00]", "6.25", "5.75"]


def test_the_curve_tells_every_point() -> None:
    page, _ = report(make_run(Path("outputs/a")))
    titles = page.texts["title"]
    for words in ("step 0: 30.000 [28.00, 32.00]", "step 20: 7.500 [5.50, 9.50]", "best: step 10: 6.000 [4.00, 8.00]"):
        assert titles.count(words) == 2, words  # for wide and for narrow screens
    labels = page.texts["text"]
    for words in ("base 30.00", "2-shot 12.00", "best 6.00, step 10", "training loss, nats a token"):
        assert labels.count(words) == 2, words


def test_answers_and_their_quality() -> None:
    run = make_run(Path("outputs/a"))
    predict(run, "checkpoint-10", ["今天不下雨。", "今日無雨。", "山高月小。", "山高月小。"])
    page, text = report(run)
    assert page.table("Quality of the answers")[1:] == [
        ["the input, copied", "all rows", "4", "18.2", "27.4", "25.0 %", "", "1.10", ""],
        ["checkpoint-10", "all rows", "4", "27.8", "27.4", "25.0 %", "50.0 %", "1.10", "0.0 %"],
        ["checkpoint-10", "into Classical", "2", "30.0", "27.4", "25.0 %", "50.0 %", "1.10", "0.0 %"],
    ]
    articles = page.texts["article"]
    assert len(articles) == 4
    assert page.texts["h4"] == ["row-1", "row-2", "row-3", "row-4"]
    assert re.sub(r"\s+", "", articles[0]) == (
        "row-1instruction今日無雨。翻譯成現代文：reference今天沒有下雨。base8.00base+28.00checkpoint-104.00今天不下雨。"
    )
    # 沒有 of the first reference became 不; the third answer shares 山, 高, 月, 小 and 。 in their order.
    assert page.texts["mark"] == ["marked", "不"]
    keys = [dict(attributes)["data-keys"] for tag, attributes in page.tags if tag == "article"]
    orders = page.texts["option"][3:]
    assert orders == [
        "file order", "systems furthest apart first", "longest output first", "highest perplexity first: base",
        "highest perplexity first: base+2", "highest perplexity first: checkpoint-10",
        "most gained from tuning first",
    ]  # fmt: skip
    assert keys[3].split() == ["3", f"{-math.log(8):.5g}", "-5", "-64", "-16", "-8", f"{math.log(1 / 8):.5g}"]
    assert [dict(a)["data-direction"] for tag, a in page.tags if tag == "article"] == ["c2m", "m2c", "c2m", "m2c"]
    assert "- checkpoint-10 (4.00): 今天不下雨。" in text
    assert "hw3 predict outputs/a data/eval.json --checkpoint checkpoint-10" in page.texts["body"][0]


def test_a_set_of_answers_that_is_missing_is_named_with_its_command() -> None:
    run = make_run(Path("outputs/a"))
    command = "hw3 predict outputs/a data/eval.json --checkpoint"

    def said() -> tuple[list[str], str]:
        page, _ = report(run)
        found = re.search(
            r"There are no answers to read yet|Not there yet: the answers of [^.]*", page.texts["body"][0]
        )
        blocks = [code.splitlines() for code in page.texts["code"]]
        hints = [block for block in blocks if all(line.startswith(command) for line in block)]
        return [line for hint in hints for line in hint], "" if found is None else found[0]

    best, base, few = f"{command} checkpoint-10", f"{command} base", f"{command} base --shots 2"
    assert said() == ([best, base, few], "There are no answers to read yet")
    predict(run, "checkpoint-10", ["甲"] * 4)
    assert said() == ([base, few], "Not there yet: the answers of base and base+2")
    predict(run, "base", ["甲"] * 4)
    assert said() == ([few], "Not there yet: the answers of base+2")
    predict(run, "base+2", ["甲"] * 4)
    assert said() == ([], "")
    make_run(Path("outputs/b"))
    page, _ = report(run, Path("outputs/b"))
    assert "outputs/b: There are no answers to read yet" in page.texts["body"][0]
    assert "outputs/a: " not in page.texts["body"][0].split("Quality")[0]


def test_answers_to_other_rows_or_changed_ones_are_left_out() -> None:
    run = make_run(Path("outputs/a"))
    other = write(Path("data/other.json"), four_rows("x"))
    predict(run, "base", ["甲"] * 4, other)
    predict(run, "checkpoint-10", ["甲"] * 4)
    file = run / "predictions/eval/checkpoint-10.json"
    file.write_text(file.read_text().replace("甲", "乙"), encoding="utf-8")
    page, _ = report(run)
    body = page.texts["body"][0]
    assert "checkpoint-10.json: changed since it was written, left out" in body
    assert not any(title.startswith("Quality") for title in page.tables)
    predict(run, "checkpoint-10", ["甲"] * 4)
    record = run / "predictions/eval/checkpoint-10.quality.json"
    write(record, json.loads(record.read_text()) | {"adapter_sha256": "that of another"})
    page, _ = report(run)
    assert "checkpoint-10.json: answers of an earlier checkpoint-10, left out" in page.texts["body"][0]


def test_scores_of_an_earlier_run_in_the_folder_are_left_out() -> None:
    run = make_run(Path("outputs/a"))
    manifest = json.loads((run / "manifest.json").read_text())
    write(run / "manifest.json", manifest | {"started": "2026-02-02T00:00:00+00:00"})
    page, _ = report(run)
    assert "No checkpoint has been scored." in page.texts["body"][0]
    assert len(page.table("Zero-shot, few-shot and tuned")) == 3


def test_hostile_text_stays_text() -> None:
    run = make_run(Path(f"outputs/{HOSTILE.replace('/', '_')}"), base=f"{HOSTILE}", marker=HOSTILE)
    predict(run, "checkpoint-10", [HOSTILE] * 4)
    quality = run / "predictions/eval/checkpoint-10.quality.json"
    quality.write_text(quality.read_text().replace('"checkpoint-10"', json.dumps("checkpoint-10")), encoding="utf-8")
    page, text = report(run)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("style") == 1
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "style", "action", "data", "xlink:href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert f"row-1{SHOWN}" in page.texts["h4"]
    assert any(f"今日無雨。{SHOWN}\n" in shown for shown in page.texts["bdi"])
    assert any(f"你是翻譯。{SHOWN}" in shown for shown in page.texts["code"])
    assert "\u202e" not in page.texts["body"][0] and "\u202e" not in text
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inside = [child for token in tokens for child in [token, *(token.children or [])]]
    assert {child.content for child in inside if child.type in ("html_inline", "html_block")} <= {"<br>"}
    assert not any("javascript" in str(value) for child in inside for value in (child.attrs or {}).values())
    shown = "".join(child.content for child in inside if child.type == "text")
    assert f"row-1{SHOWN}" in shown


def test_the_page_loads_nothing() -> None:
    make_run(Path("outputs/a"))
    page, _ = report(Path("outputs/a"))
    html = Path("outputs/a/report.html").read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    (policy,) = [dict(a)["content"] for tag, a in page.tags if dict(a).get("http-equiv") == "Content-Security-Policy"]
    digest = {
        kind: base64.b64encode(hashlib.sha256(page.texts[kind][0].encode()).digest()).decode()
        for kind in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest['style']}'; script-src 'sha256-{digest['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_the_same_files_give_the_same_bytes() -> None:
    run = make_run(Path("outputs/a"))
    report(run)
    before = {name: (run / name).read_bytes() for name in ("report.html", "report.md")}
    (run / "report.html").write_text("old", encoding="utf-8")
    report(run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


def test_several_runs() -> None:
    main_run, slow = make_run(Path("outputs/a")), make_run(Path("outputs/slow"), learning_rate=0.0005)
    large = make_run(Path("outputs/large"), base="some/large", tokenizer="t2")
    page, text = report(main_run, slow, large, words=("--out", "docs/both"))
    settings = page.table("Runs by what differs")
    assert [row[:4] for row in settings[1:]] == [
        ["outputs/a", "training.learning_rate=0.001", "6.00 [4.00, 8.00]", "10"],
        ["outputs/slow", "training.learning_rate=0.0005", "6.00 [4.00, 8.00]", "10"],
    ]
    assert settings[2][4] == "+0.00 [+0.00, +0.00]"
    assert page.table("Models side by side")[1:] == [
        ["outputs/a", "data/tiny", "50,000", "1,000", "30.00", "12.00 (2)", "6.00 [4.00, 8.00]", "10", "1.500"],
        ["outputs/large", "some/large", "50,000", "1,000", "30.00", "12.00 (2)", "6.00 [4.00, 8.00]", "10", "1.500"],
    ]
    assert "have different tokenizers" in page.texts["body"][0]
    assert "hw3 report outputs/a outputs/slow outputs/large --out docs/both" in text
    assert not Path("outputs/a/report.html").exists()
    first = page.texts["article"][0]
    assert first.count("outputs/a: ") == 3 and first.count("outputs/large: ") == 3


def test_one_tokenizer_compares_perplexities_and_other_rows_nothing() -> None:
    main_run, large = make_run(Path("outputs/a")), make_run(Path("outputs/large"), base="some/large")
    page, _ = report(main_run, large)
    assert "have one tokenizer, so their perplexities can be compared: +0.00 [+0.00, +0.00]" in page.texts["body"][0]
    other = make_run(Path("outputs/other"), base="some/large", marker="！")
    page, _ = report(main_run, other)
    assert "outputs/other was scored on other rows than outputs/a" in page.texts["body"][0]
    # The scored file is another one now: the page says so and shows no text of it.
    assert "data/eval.json is not here as it was scored" in page.texts["body"][0]


def test_a_dev_file_chooses_and_is_drawn() -> None:
    run = make_run(Path("outputs/a"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    dev = write(Path("data/dev.json"), four_rows())
    recipe["data"]["dev"] = str(dev)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    shutil.copytree(run / "eval/eval", run / "eval/dev")
    scored = json.loads((run / "eval/dev/results.json").read_text(encoding="utf-8"))
    scored["data"] |= {"path": "data/dev.json", "sha256": "of the dev file"}
    for one in scored["entries"]:
        if one["checkpoint"] == "checkpoint-20":
            one |= {"mean_perplexity": 5.0, "mean_perplexity_ci95": [4.0, 6.0]}
    write(run / "eval/dev/results.json", scored)
    page, _ = report(run)
    assert [row[0] for row in page.table("Perplexity by checkpoint")] == ["step", "10", "20 (chosen)"]
    assert page.table("The same checkpoint on other files")[1:] == [
        ["data/dev.json", "4", "30.00 [28.00, 32.00]", "5.00 [4.00, 6.00]"]
    ]
    assert "The checkpoint was chosen on data/dev.json, so this file had no part in it." in page.texts["body"][0]
    assert page.texts["title"].count("dev, step 20: 5.000 [4.00, 6.00]") == 2
    # One command scores both files.
    commands = next(code for code in page.texts["code"] if code.startswith("accelerate launch"))
    assert commands.count("hw3 eval") == 2 and "--data" not in commands


def test_the_sample_is_of_both_directions() -> None:
    assert evenly(3, 10) == [0, 1, 2]
    assert evenly(144, 10) == [0, 16, 32, 48, 64, 79, 95, 111, 127, 143]


def test_missing_parts_say_which_command_makes_them() -> None:
    shots = make_run(Path("outputs/shots"), names=("base", "base+2"), trained=False)
    page, text = report(shots)
    for words in ("hw3 train RECIPE.yaml --run outputs/shots", "hw3 eval outputs/shots", "make train MODEL=llama",
                  "hw3 predict outputs/shots data/eval.json --checkpoint base"):  # fmt: skip
        assert any(words in code for code in page.texts["code"]), words
        assert words in text
    trained = make_run(Path("outputs/trained"), names=())
    page, _ = report(trained)
    assert "outputs/trained: nothing has been scored on data/eval.json yet." in page.texts["body"][0]
    assert "hw3 eval outputs/trained --base-only --shots 0 1 2" in page.texts["code"]


def test_a_mistake_writes_nothing() -> None:
    run = make_run(Path("outputs/a"))
    assert "outputs/none: no such run" in hw3("report", run, "outputs/none", expected=2)
    assert "outputs/a: named twice" in hw3("report", run, "outputs/../outputs/a", expected=2).replace("../outputs/", "")
    Path("file").write_text("", encoding="utf-8")
    assert "file: is a file" in hw3("report", run, "--out", "file", expected=2)
    (run / "eval/eval/results.json").write_text("{", encoding="utf-8")
    assert "results.json: cannot be read" in hw3("report", run, expected=2)
    assert not (run / "report.html").exists()


@given(st.text(), st.text())
def test_an_answer_in_pieces_is_the_answer(reference: str, output: str) -> None:
    pieces = marked(reference, output)
    assert "".join(text for text, _ in pieces) == output
    assert marked(output, output) == ([(output, False)] if output else [])


def test_invisible_characters_are_spelled_out() -> None:
    assert visible("a\u202eb\u200bc\x00d\ud800e\u2028f\n\tg齣") == r"a\u202eb\u200bc\u0000d\ud800e\u2028f" + "\n\tg齣"


_PRINTABLE = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Cf", "Zs", "Zl", "Zp")), min_size=1)


@given(_PRINTABLE)
def test_markdown_shows_text_as_it_stands(text: str) -> None:
    (paragraph, inline, _) = MarkdownIt("commonmark").enable("table").parse(str(markdown(text)))
    assert paragraph.type == "paragraph_open"
    assert "".join(child.content for child in inline.children) == text


@given(st.lists(st.sampled_from(["`", "```", "~~~", "text", "\n"])).map("".join))
def test_a_fence_ends_where_its_text_does(text: str) -> None:
    (token,) = MarkdownIt("commonmark").parse(str(fence(text)))
    assert token.type == "fence" and token.content == (text + "\n" if text else "\n")
