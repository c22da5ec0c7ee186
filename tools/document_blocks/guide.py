"""Blocks of the README and of the guide to the course, in English and in Traditional Chinese."""

from __future__ import annotations

import re

from document_blocks.sources import (
    REPOSITORY,
    Report,
    find_row,
    format_run_peak,
    format_table,
    read_json,
    read_report,
)
from hw3.config.recipe import load_recipe

GPU_TEXT = {
    "en": {
        "headings": ("your machine", "base model", "type", "GPU memory in training"),
        "cpu": ("no GPU", "6 million parameters, in this repository", "`make train`", "none"),
        "smollm2": ("no GPU, or any", "SmolLM2-135M-Instruct", "`make train MODEL=smollm2` ([below](#no-hub-no-gpu))"),
        "t4": (
            "T4, 16 GB (no bfloat16)",
            "Gemma-2-2B",
            "`make train MODEL=gemma SET=model.dtype=auto`",
            "{} GiB, computed",
        ),
        "8": ("8 GB", "Gemma-2-2B", "`make train MODEL=gemma`", "{} GiB on a GPU limited to 8 GiB"),
        "8 qwen": ("8 GB", "Qwen3-4B", "`make train MODEL=qwen`", "{} GiB on a GPU limited to 8 GiB"),
        "12": ("12 GB", "Llama-3-8B", "`make train MODEL=llama`", "{} GiB on a GPU limited to 12 GiB"),
        "32": ("32 GB or more", "Llama-3-8B, faster", "`make train MODEL=llama`", "{} GiB"),
        "several": ("several", "any of them", "`make train MODEL=gemma GPUS=2`", "{} GiB on each"),
        "sharded": (
            "several, for a large model",
            "for example Gemma-2-27B",
            "[fsdp2](docs/several-gpus.md)",
            "{} GiB on each of 2",
        ),
        "about": (
            "Measured on {gpu}, with random weights of the same shape (SmolLM2: its own); other GPUs were not tried. "
            "There, the Gemma recipe takes {gemma:.1f} minutes, and the Llama recipe about {llama:.1f} minutes "
            "(estimated from {steps} steps). The model in this repository takes {tiny:.0f} s on 2 CPU cores."
        ),
    },
    "zh": {
        "headings": ("你的機器", "基礎模型", "指令", "訓練時的顯示卡記憶體"),
        "cpu": ("沒有顯示卡", "600 萬參數，就在這個 repo 裡", "`make train`", "不需要"),
        "smollm2": (
            "沒有顯示卡，或任何顯示卡",
            "SmolLM2-135M-Instruct",
            "`make train MODEL=smollm2`（[見下](#沒有-hub也沒有顯示卡)）",
        ),
        "t4": (
            "T4，16 GB（不支援 bfloat16）",
            "Gemma-2-2B",
            "`make train MODEL=gemma SET=model.dtype=auto`",
            "{} GiB（計算值）",
        ),
        "8": ("8 GB", "Gemma-2-2B", "`make train MODEL=gemma`", "{} GiB（顯示卡限制在 8 GiB）"),
        "8 qwen": ("8 GB", "Qwen3-4B", "`make train MODEL=qwen`", "{} GiB（顯示卡限制在 8 GiB）"),
        "12": ("12 GB", "Llama-3-8B", "`make train MODEL=llama`", "{} GiB（顯示卡限制在 12 GiB）"),
        "32": ("32 GB 以上", "Llama-3-8B，比較快", "`make train MODEL=llama`", "{} GiB"),
        "several": ("多張顯示卡", "以上任何一個", "`make train MODEL=gemma GPUS=2`", "每張 {} GiB"),
        "sharded": ("多張顯示卡，大模型", "例如 Gemma-2-27B", "[fsdp2](docs/several-gpus.md)", "2 張，每張 {} GiB"),
        "about": (
            "以上數字在 {gpu} 上以同樣大小的隨機權重測得（SmolLM2 用真實權重），沒有試過其他型號。在這張卡上，"
            "Gemma 的 recipe 跑完要 {gemma:.1f} 分鐘，Llama 約 {llama:.1f} 分鐘（由 {steps} 步推算）。"
            "Repo 內附的模型在 2 個 CPU 核心上要 {tiny:.0f} 秒。"
        ),
    },
}
SCORE_TEXT = {
    "en": {
        "headings": ("", "mean perplexity [95 %]"),
        "base": "base model, {}-shot",
        "best": "**fine-tuned, step {:,} (best)**",
        "last": "fine-tuned, step {:,} (last)",
        "about": "{} rows of `{}`.",
    },
    "zh": {
        "headings": ("", "平均困惑度 [95 % 信賴區間]"),
        "base": "未微調，{}-shot",
        "best": "**微調後，第 {:,} 步（最好）**",
        "last": "微調後，第 {:,} 步（最後）",
        "about": "`{1}` 的 {0} 筆資料。",
    },
}
TIME_TEXT = {
    "en": {
        "headings": ("", "model in this repository, 2 CPU cores", "Gemma-2-2B's shape, one {}"),
        "train": "{:.0f} s for {:,} steps",
        "eval": "{:.0f} s for {:,} checkpoints",
        "predict": "{:.0f} s for {:,} rows",
    },
    "zh": {
        "headings": ("", "repo 內附的模型，2 個 CPU 核心", "Gemma-2-2B 的架構，一張 {}"),
        "train": "{:.0f} 秒，{:,} 步",
        "eval": "{:.0f} 秒，{:,} 個檢查點",
        "predict": "{:.0f} 秒，{:,} 筆資料",
    },
}
PUBLISHED_HEADINGS = {
    "en": ("base model", "year", "best", "rows seen until then", "settings", "repository"),
    "zh": ("基礎模型", "年份", "最佳", "當時看過的資料筆數", "設定", "repo"),
}
REPRODUCIBLE_TEXT = {
    "en": (
        "On one {gpu}, {settings} settings were each trained three times with `speed: auto`, each time in a new "
        "process. The third run of each was killed twice and resumed. All three adapters of a setting are bitwise "
        "equal."
    ),
    "zh": (
        "在一張 {gpu} 上，以 `speed: auto` 把 {settings} 種設定各訓練三次：跑一次、另開一個行程再跑一次、"
        "中途強制結束兩次再接著跑一次。每種設定的三個 adapter，每個位元組都相同。"
    ),
}


def gpus(language: str) -> str:
    """Which model fits on which GPU, with the memory that was measured."""
    text = GPU_TEXT[language]
    memory = {row["setting"]: row for row in read_report("memory")["rows"]}
    limited = {(row["recipe"], row["limit_gib"]): row["held_gib"] for row in read_report("small_gpus")["rows"]}
    rows = [
        text["cpu"],
        (*text["smollm2"], format_run_peak(read_json("docs/smollm2/manifest.json"))),
        _with_memory(text["t4"], find_row(read_report("t4_computed"), "gemma")["gib"]),
        _with_memory(text["8"], limited["gemma", 8]),
        _with_memory(text["8 qwen"], limited["qwen", 8]),
        _with_memory(text["12"], limited["llama", 12]),
        _with_memory(text["32"], memory["8b-1gpu-auto"]["held_gib"]),
        _with_memory(text["several"], memory["2b-ddp-2"]["held_gib"]),
        _with_memory(text["sharded"], memory["27b-fsdp2-checkpointing-2"]["peak_gib"]),
    ]
    llama = read_report("train_step_llama")["rows"][0]
    about = text["about"].format(
        gpu=read_report("train_step")["machine"]["gpu"],
        gemma=read_report("train_step_full_run")["rows"][0]["seconds_total"] / 60,
        llama=(llama["seconds_per_step"] * _llama_steps() + llama["seconds_capturing"]) / 60,
        steps=llama["steps"],
        tiny=_tiny_seconds(),
    )
    return f"{format_table(text['headings'], rows)}\n\n{about}"


def _with_memory(cells: tuple[str, ...], gib: float) -> tuple[str, ...]:
    return (*cells[:-1], cells[-1].format(f"{gib:.1f}"))


def _llama_steps() -> int:
    return load_recipe(REPOSITORY / "recipes/llama/qlora.yaml").training["max_steps"]


def _tiny_seconds() -> float:
    return sum(session["seconds"] for session in read_json("docs/tiny/manifest.json")["sessions"])


def scores(folder: str, language: str) -> str:
    """Scores of the base model and of the best and last checkpoints."""
    text, results = SCORE_TEXT[language], read_json(f"{folder}/results.json")
    selected = results["best"]["checkpoint"]
    best = next(entry for entry in results["entries"] if entry["checkpoint"] == selected and entry["shots"] == 0)
    entries = [entry for entry in results["entries"] if entry["prompt"]["sha256"] == best["prompt"]["sha256"]]
    base = sorted((entry for entry in entries if entry["checkpoint"] is None), key=lambda entry: entry["shots"])
    last = max((entry for entry in entries if entry["shots"] == 0), key=lambda entry: entry["step"])
    named = [(text["base"].format(entry["shots"]), entry) for entry in base]
    named += [(text["best"].format(best["step"]), best), (text["last"].format(last["step"]), last)]
    rows = []
    for name, entry in named:
        low, high = entry["mean_perplexity_ci95"]
        rows.append((name, f"{entry['mean_perplexity']:.2f} [{low:.2f}, {high:.2f}]"))
    about = text["about"].format(results["data"]["rows"], results["data"]["path"])
    return f"{format_table(text['headings'], rows)}\n\n{about}"


def times(language: str) -> str:
    """How long the commands take from start to end, with the model in the repository and with a large one."""
    text = TIME_TEXT[language]
    gpu, cpu = read_report("parallel_inference"), read_report("parallel_inference_cpu")
    full_run = read_report("train_step_full_run")["rows"][0]
    steps = read_json("docs/tiny/manifest.json")["sessions"][-1]["to_step"]
    cells = {
        "train": [(_tiny_seconds(), steps), (full_run["seconds_total"], full_run["steps"])],
        "eval": [_time_of(report, "hw3 eval") for report in (cpu, gpu)],
        "predict": [_time_of(report, "hw3 predict") for report in (cpu, gpu)],
    }
    rows = [(f"`make {name}`", *(text[name].format(*cell) for cell in pair)) for name, pair in cells.items()]
    return format_table([heading.format(gpu["machine"]["gpu"]) for heading in text["headings"]], rows)


def _time_of(report: Report, command: str) -> tuple[float, int]:
    """Return the seconds and the number of checkpoints or rows of the longest measured call with one process."""
    rows = [row for row in report["rows"] if row["processes"] == 1 and row["setting"].startswith(command)]
    row = max(rows, key=lambda row: row["seconds_total"])
    return row["seconds_total"], int(re.search(r"\d+", row["setting"].removeprefix("hw3"))[0])


def reproducibility(language: str) -> str:
    """How many settings gave the same bytes again; all must, because the documents promise it."""
    report = read_report("reproducibility")
    rows = [row for row in report["rows"] if "plain" not in row["setting"]]
    assert all(row["repeated_is_equal"] and row["killed_is_equal"] for row in report["rows"])
    return REPRODUCIBLE_TEXT[language].format(gpu=report["machine"]["gpu"], settings=len(rows))


def smollm2_settings() -> str:
    """Best scores of SmolLM2-135M-Instruct with several settings."""
    saved = read_json("docs/smollm2/settings.json")
    rows = [(row["setting"], f"{row['best_mean_perplexity']:.2f}", f"{row['best_step']:,}") for row in saved["rows"]]
    return f"{format_table(['', 'best mean perplexity', 'step'], rows)}\n\nOn {saved['machine']}."


def published(language: str) -> str:
    """Scores that others report for the homework."""
    rows = [
        (
            row["model"],
            row["edition"],
            f"{row['score']:.2f}",
            f"{row['rows_seen']:,}" if row["rows_seen"] else "",
            row["setting"][language],
            row["repository"],
        )
        for row in read_json("docs/published_scores.json")["rows"]
    ]
    return format_table(PUBLISHED_HEADINGS[language], rows)
