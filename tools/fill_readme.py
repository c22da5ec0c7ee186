"""Fills the tables of the documents from the files that commands wrote, so that no figure is typed by hand.

Those of `docs/benchmarks/` are files of their own; in a document a block lies between `<!-- NAME -->` and
`<!-- /NAME -->`. `--check` changes nothing and ends with 1 where one of them is not what the files say.

    python tools/fill_readme.py
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from trl import SFTConfig

from hw3.common.disk import gib
from hw3.config.recipe import load_recipe
from hw3.config.schema import (
    DECIDED_TRAINING_KEYS,
    DataSection,
    EvaluationSection,
    GenerationSection,
    ModelSection,
    QuantizationSection,
)
from hw3.data.prompt import Prompt
from hw3.modeling.loading import parameter_counts
from hw3.training.sft_arguments import disk_needed

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from report import table  # noqa: E402


def read(name: str) -> Any:
    """A JSON file of the repository."""
    return json.loads((REPOSITORY / name).read_text(encoding="utf-8"))


def recipes() -> str:
    """One line a recipe, from the recipe files."""
    lines = ["| recipe | base | LoRA r / alpha | rows a step | steps | learning rate |", "|---|---|---|---|---|---|"]
    for path in sorted(REPOSITORY.glob("recipes/*/*.yaml")):
        if path.parent.name == "prompts":
            continue
        recipe = load_recipe(path)
        lora, training = recipe.lora or {}, recipe.training
        name = recipe.model.pretrained_model_name_or_path
        lines.append(
            f"| [`{path.parent.name}/{path.stem}`]({path.relative_to(REPOSITORY).as_posix()}) | `{name}` "
            f"| {lora['r']} / {lora['lora_alpha']} | {training['per_device_train_batch_size']} x "
            f"{training['gradient_accumulation_steps']} | {training['max_steps']:,} | {training['learning_rate']:g} |"
        )
    return "\n".join(lines)


def scores(folder: str) -> str:
    """The base with worked examples and the best checkpoint of a kept results file."""
    results = read(f"{folder}/results.json")
    best = results["best"]
    base = sorted((e for e in results["entries"] if e["checkpoint"] is None), key=lambda entry: entry["shots"])
    tuned = [e for e in results["entries"] if e["checkpoint"] is not None and e["shots"] == 0]
    last = max(tuned, key=lambda entry: entry["step"])
    chosen = next(entry for entry in tuned if entry["step"] == best["step"])
    named = [(f"base, {entry['shots']} worked example{'' if entry['shots'] == 1 else 's'}", entry) for entry in base]
    named += [(f"**tuned, step {chosen['step']:,} (best)**", chosen), (f"tuned, step {last['step']:,} (last)", last)]
    lines = ["| | mean perplexity [95 %] | token perplexity | bits a character |", "|---|---|---|---|"]
    for name, entry in named:
        low, high = entry["mean_perplexity_ci95"]
        lines.append(
            f"| {name} | {entry['mean_perplexity']:.2f} [{low:.2f}, {high:.2f}] | {entry['token_perplexity']:.2f} "
            f"| {entry['bits_per_character']:.3f} |"
        )
    unknown, tokens = chosen["unknown_tokens"], chosen["tokens"]
    lines += [
        "",
        f"{results['data']['rows']} rows; {unknown} of {tokens:,} output tokens unknown ({unknown / tokens:.2%}).",
    ]
    return "\n".join(lines)


def train_step() -> str:
    """Seconds and memory of an optimizer step, and how far the captured one is from TRL's."""
    report, later = (read(f"docs/benchmarks/train_step{name}.json") for name in ("", "_later"))
    again, lean, script = (_row(later, word) for word in ("auto", "lean", "script"))
    lines = ["| 8 rows a step, all in one run | s a step | rows/s | peak GiB | MFU |", "|---|---|---|---|---|"]
    lines += [_step(row) for row in report["rows"]]
    lines += [
        "",
        "In later runs, on other such machines:",
        "",
        "| | s a step | rows/s | peak GiB | MFU |",
        "|---|---|---|---|---|",
    ]
    lines += [_step(row) for row in later["rows"]]
    lines += [
        "",
        "Llama-3-8B's shape, 8 rows a step (`--llama`), on several such machines:",
        "",
        "| | s a step | rows/s | peak GiB | MFU |",
        "|---|---|---|---|---|",
    ]
    eight = read("docs/benchmarks/train_step_llama.json")
    lines += [_step(row, "Llama-3-8B shape, ") for row in eight["rows"]]
    auto, machine, versions = report["rows"][0], report["machine"], report["versions"]
    (whole,) = read("docs/benchmarks/train_step_whole.json")["rows"]
    llama = _row(eight, "auto")
    times = {
        word: _row(eight, word)["seconds_per_step"] / llama["seconds_per_step"]
        for word in ("TRL tuned", "lean", "defaults", "script")
    }
    least, *_, most = sorted(
        row.get("matmul_tflops", each["machine"]["matmul_tflops"])
        for each in (report, later, eight)
        for row in each["rows"]
    )
    warm = min(row["seconds_capturing"] for row in read("docs/benchmarks/scaling.json")["rows"])
    unsloth, unsloth_eight = (read(f"docs/benchmarks/unsloth_step{name}.json") for name in ("", "_llama"))
    defaults, tuned = _row(unsloth, "defaults"), _row(unsloth, "tuned")
    defaults_eight, tuned_eight = _row(unsloth_eight, "defaults"), _row(unsloth_eight, "tuned")
    quoted = min(read("docs/benchmarks/quoted.json")["rows"], key=lambda row: row["seconds_per_step"])
    same = read("docs/benchmarks/equivalence.json")
    differences = {row["run"]: row for row in same["relative_differences"]}
    plain, captured = (differences[name]["loss_mean"] for name in ("plain 2 x 4", "captured"))
    by_hand = _row(report, "TRL tuned")
    told = [row for each in (report, later, eight) for row in each["rows"]]
    errors = [abs(row["probe_error"]) for row in told]
    # Since a step that is not captured is timed with more layers.
    since = [
        abs(row["probe_error"]) for row in told if not row["speed"]["captured"] and "3" not in row["probe"]["wall"]
    ]
    where = (
        f"One {machine['gpu']}, torch {versions['torch']}, trl {versions['trl']}; random weights, the course's rows."
    )
    lines += [
        "",
        f"{where} MFU is the share of what a bfloat16 product gave there, {least:.0f} to {most:.0f} TFLOP/s. "
        f"Peak is what PyTorch had allocated at most; it has reserved more, {again['peak_reserved_gib']:.1f} GiB for "
        "`auto`, the graphs' own memory among it. Peaks of the larger steps count what earlier runs of the process "
        "still held.",
        "",
        f"- `auto` is {by_hand['seconds_per_step'] / auto['seconds_per_step']:.1f} times as fast as TRL tuned by hand, "
        f"on Llama-3-8B's shape {times['TRL tuned']:.1f} times; there {times['script']:.0f} times as fast as the "
        f"course's settings on the same machine, {times['lean']:.0f} and {times['defaults']:.0f} times as `lean` and "
        "TRL's defaults on another. A CPU sets the pace of all but `auto`, and the machines' differ.",
        "- `lean` is TRL's step at the script's settings, and takes as long: "
        f"{_row(report, 'lean')['seconds_per_step']:.2f} s against {_row(report, 'script')['seconds_per_step']:.2f} s "
        f"in the first run, {lean['seconds_per_step']:.2f} s against {script['seconds_per_step']:.2f} s in the later.",
        f"- Unsloth {tuned['versions']['unsloth']}, rows and base the same, on another such machine: "
        f"{defaults['seconds_per_step']:.3f} s and {defaults['peak_gib']:.1f} GiB as it comes, "
        f"{tuned['seconds_per_step']:.3f} s and {tuned['peak_gib']:.1f} GiB tuned by hand: `auto` is "
        f"{tuned['seconds_per_step'] / auto['seconds_per_step']:.1f} times as fast. On Llama-3-8B's shape "
        f"{defaults_eight['seconds_per_step']:.3f} s, {defaults_eight['peak_gib']:.1f} GiB, and "
        f"{tuned_eight['seconds_per_step']:.3f} s, {tuned_eight['peak_gib']:.1f} GiB: "
        f"`auto` is {tuned_eight['seconds_per_step'] / llama['seconds_per_step']:.1f} times as fast. Its compiler was "
        f"off (`benchmarks/unsloth_step.py`). An earlier script saw {quoted['seconds_per_step']:.3f} s on Gemma's "
        "(`docs/benchmarks/quoted.json`).",
        f"- Before the first step, compiling and capturing: {auto['seconds_capturing']:.0f} s; {warm:.0f} s (two GPUs) "
        "where what was compiled for an earlier run was still there.",
        f"- What `hw3 check` told before each: seconds within {max(errors):.0%}, half of them within "
        f"{statistics.median(errors):.0%}; since steps that are not captured are timed with more layers, within "
        f"{max(since):.0%} ({len(since)} runs). Memory: [docs/several-gpus.md](docs/several-gpus.md#memory).",
        f"- The whole recipe, {whole['steps']:,} steps and a checkpoint every 100: {whole['seconds_whole']:.0f} s "
        "(`--whole`).",
        f"- On the small model, losses of {same['steps']} captured steps differ from TRL's by {captured:.2%} on "
        f"average, those of TRL's own runs in two batch layouts by {plain:.2%} (`benchmarks/equivalence.py`).",
    ]
    return "\n".join(lines)


def _peak(row: dict[str, Any]) -> str:
    """A run's memory in words."""
    return f"{row['peak_gib']:.1f} GiB, {row['peak_reserved_gib']:.1f} reserved"


def _row(report: dict[str, Any], word: str) -> dict[str, Any]:
    """The row whose setting has this word in it."""
    return next(row for row in report["rows"] if word in row["setting"])


def _step(row: dict[str, Any], shape: str = "") -> str:
    """A table's line on an optimizer step; the setting without the words on the shape."""
    figures = f"{row['seconds_per_step']:.4f} | {row['rows_per_second']:.0f} | {row['peak_gib']:.1f} | {row['mfu']:.1%}"
    return f"| {row['setting'].removeprefix(shape)} | {figures} |"


def exactness() -> str:
    """Errors of scores in bfloat16."""
    report = read("docs/benchmarks/exactness.json")
    lines = ["| | RMS error, nats a row | against the course's loop |", "|---|---|---|"]
    lines += [
        f"| {row['setting']} | {row['rms_error_nats']:.4f} | {row['ratio_to_the_courses_loop']:.2f} |"
        for row in report["rows"]
    ]
    return "\n".join([*lines, "", f"{report['rows'][0]['rows']} rows, one {report['machine']['gpu']}."])


def decoding() -> str:
    """Seconds that answers take, with the captured step and without."""
    plain, packed = (read(f"docs/benchmarks/decoding{name}.json") for name in ("", "_packed"))
    lines = [
        "| rows | s | s, not captured | tokens/s | peak | 4-bit base packed: s | s, not captured | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    same = True
    pairs = [zip(report["rows"][::2], report["rows"][1::2], strict=True) for report in (plain, packed)]
    for (captured, alone), (captured_4, alone_4) in zip(*pairs, strict=True):
        same &= alone["same_answers"] == alone["rows"] and alone_4["same_answers"] == alone_4["rows"]
        lines.append(
            f"| {captured['rows']} | {captured['seconds']:.1f} | {alone['seconds']:.1f} "
            f"| {captured['tokens_per_second']:,} | {_peak(captured)} | {captured_4['seconds']:.1f} "
            f"| {alone_4['seconds']:.1f} | {_peak(captured_4)} |"
        )
    answers = "The answers are the same" if same else "Not all answers are the same"
    tries = len(plain["rows"][0]["seconds_all"])
    about = (
        f"{_where(plain)}; answers of 64 tokens, prompts counted in; medians of {tries}, once where not captured. "
        f"{answers}, captured or not. What is reserved beyond the peak is given back where memory is short."
    )
    return "\n".join([*lines, "", about])


def evaluation() -> str:
    """Seconds a checkpoint, from the scoring benchmark."""
    report = read("docs/benchmarks/evaluation.json")
    lines = ["| | s a checkpoint | peak GiB |", "|---|---|---|"]
    for row in report["rows"]:
        if "peak_gib" in row and "tokens a batch" not in row["setting"]:
            lines.append(f"| {row['setting']} | {row['seconds_per_checkpoint']:.2f} | {row['peak_gib']:.1f} |")
    sweep, *parts = [row for row in report["rows"] if "seconds_sweep" in row]
    where = f"One {report['machine']['gpu']}; {sweep['setting']}: {sweep['seconds_sweep']:.0f} s. Of these:"
    named = [(part["setting"].partition(" of which ")[2], part["seconds_sweep"]) for part in parts]
    taken = "; ".join(f"{name} {seconds:.1f}" for name, seconds in named if name)
    return "\n".join([*lines, "", where, f"{taken}."])


def scaling() -> str:
    """Rows a second on one GPU and on several."""
    report = read("docs/benchmarks/scaling.json")
    lines = ["| | rows/s | times one GPU | peak GiB a GPU |", "|---|---|---|---|"]
    for row in report["rows"]:
        times = f"{row['speedup']:.2f}" if "speedup" in row else ""
        lines.append(f"| {row['setting']} | {row['rows_per_second']:.0f} | {times} | {row['peak_gib']:.1f} |")
    return "\n".join([*lines, "", f"Up to {_where(report)}; Gemma-2-2B's shape, `ddp`, the recipe as it is."])


def shared_out() -> str:
    """Scoring and prediction by two processes against one, on GPUs and on a CPU."""
    gpu, cpu = read("docs/benchmarks/shared_out.json"), read("docs/benchmarks/shared_out_cpu.json")
    lines = ["| | on | processes | s | times one process |", "|---|---|---|---|---|"]
    for report, name in ((gpu, gpu["machine"].get("gpu")), (cpu, "CPU")):
        for row in sorted(report["rows"], key=lambda row: (row["setting"], row["processes"])):
            figures = f"{row['processes']} | {row['seconds']:.1f} | {row['speedup']:.2f}"
            lines.append(f"| {row['setting']} | {name} | {figures} |")
    apart = max(row.get("furthest_apart", 0) for row in (*gpu["rows"], *cpu["rows"]))
    cores, tries = cpu["machine"]["cpu_cores"], len(cpu["rows"][0]["seconds_all"])
    about = (
        "From the loaded base to the last entry or answer. GPUs: Gemma-2-2B's shape with random weights, answers of 64 "
        f"tokens, once. CPU: the tiny run, {cores} cores, one thread a process, medians of {tries}. Perplexities of "
        f"one process and of two differ by {apart:.0e} at most."
    )
    return "\n".join([*lines, "", about])


def memory() -> str:
    """Memory a GPU of each way to train, measured, and as `hw3 check` counts it."""
    report = read("docs/benchmarks/memory.json")
    lines = [
        "| | processes | GiB a process, steps | most that PyTorch allocated | `hw3 check`'s count |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        figures = "did not work | | "
        if "failed" not in row:
            told = f"{row['estimate_gib']:.1f} ({row['estimate_error']})"
            figures = f"{row['held_gib']:.1f} | {row['peak_gib']:.1f} | {told}"
        lines.append(f"| {row['shape'].upper()} {row['strategy']} | {row['gpus']} | {figures} |")
    about = (
        f"{_where(report)}; random 4-bit bases, eight long rows a step, the count for those rows. 2B and 27B are "
        "Gemma-2's shapes, 8B Llama-3's; `checkpointing` computes activations again, the others of `fsdp2` and `zero3` "
        "keep them. What the captured step's graphs hold is counted in with the steps, and is outside of what PyTorch "
        "allocated, loading included. One process a GPU, but that four share two."
    )
    return "\n".join([*lines, "", about])


def same_result() -> str:
    """Runs on several GPUs against one on one."""
    report = read("docs/benchmarks/same_result.json")
    lines = ["| | loss of the first step | losses, on average | losses, at most | score |", "|---|---|---|---|---|"]
    for row in report["rows"][1:]:
        keys = ("loss_first_step", "loss_mean", "loss_most", "score")
        figures = " | ".join("*not run*" if "failed" in row else f"{row[key]:.2%}" for key in keys)
        lines.append(f"| {row['setting']} | {figures} |")
    steps = len(report["rows"][0]["losses"])
    about = (
        f"{_where(report)}; {steps} steps of the tiny recipe in bfloat16, how far from TRL's step on one GPU, "
        "relative; the first line is what rounding makes. Scores are of the last checkpoint, on one GPU. Four "
        "processes share two GPUs, as two machines of two."
    )
    return "\n".join([*lines, "", about])


def _where(report: dict[str, Any]) -> str:
    """The machine and versions of a benchmark."""
    machine, versions = report["machine"], report["versions"]
    return f"{machine['gpus']} x {machine['gpu']}, torch {versions['torch']}, trl {versions['trl']}"


def costs() -> str:
    """Disk, memory and time of each recipe; measured where there is a measurement."""
    tiny, report = read("docs/tiny/manifest.json"), read("docs/benchmarks/train_step.json")
    plain = read("docs/benchmarks/gpu_recipe.json")["rows"][0]
    measured = read("docs/benchmarks/train_step_later.json")["rows"][0]
    lines = ["| recipe | trained parameters | disk | GPU memory, training | time |", "|---|---|---|---|---|"]
    shapes = read("benchmarks/shapes.json")
    for name in ("tiny", "gemma", "llama", "qwen"):
        recipe = load_recipe(REPOSITORY / f"recipes/{name}/qlora.yaml")
        training = recipe.training
        trained = tiny["parameters"]["trained"]
        if name != "tiny":
            trained, _ = parameter_counts(recipe, AutoConfig.for_model(**shapes[name]))
        config = SFTConfig(
            output_dir="", use_cpu=True, bf16=False, max_steps=training["max_steps"], save_steps=training["save_steps"],
            optim=training["optim"], activation_checkpointing=False,
        )  # fmt: skip
        disk = gib(disk_needed(config, None, trained, training["max_steps"], steps_per_epoch=1))
        memory, time = "not measured", "not measured"
        if name == "tiny":
            seconds = sum(session["seconds"] for session in tiny["sessions"])
            memory, time = "none", f"{seconds:.0f} s on 2 CPU cores"
        if name == "gemma":
            whole = read("docs/benchmarks/train_step_whole.json")["rows"][0]
            memory = f"{_peak(measured)}; with `speed: plain` {plain['peak_gib']:.1f}"
            time = f"{whole['seconds_whole'] / 60:.1f} min on one {report['machine']['gpu']}"
        if name == "llama":
            eight = read("docs/benchmarks/train_step_llama.json")["rows"][0]
            minutes = (eight["seconds_per_step"] * training["max_steps"] + eight["seconds_capturing"]) / 60
            memory = _peak(eight)
            time = f"{minutes:.1f} min on one {report['machine']['gpu']}, reckoned from {eight['steps']} steps"
        lines.append(f"| `{name}` | {trained:,} | {disk} | {memory} | {time} |")
    return "\n".join(lines)


def recipe_keys() -> str:
    """Keys, defaults and values of the sections whose schema is the project's own."""
    lines = ["| key | default | values |", "|---|---|---|"]
    sections = {
        "model": ModelSection,
        "quantization": QuantizationSection,
        "prompt": Prompt,
        "data": DataSection,
        "generation": GenerationSection,
        "evaluation": EvaluationSection,
    }
    for section, schema in sections.items():
        for name, properties in schema.model_json_schema()["properties"].items():
            default = "needed" if name in schema.model_json_schema().get("required", ()) else properties.get("default")
            text = default if default == "needed" else f"`{json.dumps(default, ensure_ascii=False)}`"
            lines.append(f"| `{section}.{name}` | {text} | {_values(properties)} |")
    return "\n".join(lines)


def _values(properties: dict[str, Any]) -> str:
    """What a key may hold, from its JSON schema."""
    if "enum" in properties:
        return ", ".join(f"`{value}`" for value in properties["enum"])
    if "const" in properties:
        return f"`{json.dumps(properties['const'])}`"
    if "anyOf" in properties:
        return " or ".join(filter(None, map(_values, properties["anyOf"])))
    kinds = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    kind = {**kinds, "array": "list", "null": "`null`"}.get(properties.get("type", ""), "")
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
    return " ".join([kind, *(f"{word} {properties[bound]}" for bound, word in bounds.items() if bound in properties)])


def decided_keys() -> str:
    """Keys of `training` that a recipe may not hold, with what to use."""
    lines = ["| key | instead |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{key}` | {instead} |" for key, instead in sorted(DECIDED_TRAINING_KEYS.items()))])


BLOCKS: dict[str, Callable[[], str]] = {
    "recipe_keys": recipe_keys,
    "decided_keys": decided_keys,
    "recipes": recipes,
    "tiny": lambda: scores("docs/tiny"),
    "homework": lambda: scores("docs/homework"),
    "train_step": train_step,
    "exactness": exactness,
    "decoding": decoding,
    "costs": costs,
    "evaluation": evaluation,
    "scaling": scaling,
    "memory": memory,
    "same_result": same_result,
    "shared_out": shared_out,
    "proper": lambda: scores("docs/homework/proper"),
}


DOCUMENTS = {
    "docs/recipe.md": ("recipe_keys", "decided_keys"),
    "README.md": (
        "tiny",
        "recipes",
        "train_step",
        "scaling",
        "evaluation",
        "exactness",
        "decoding",
        "homework",
        "costs",
    ),
    "docs/several-gpus.md": ("same_result", "scaling", "shared_out", "memory"),
    "docs/homework/README.md": ("homework", "proper"),
}


def fill(text: str, names: tuple[str, ...]) -> str:
    """The text with the content of each named block made anew.

    Raises:
        ValueError: the text has no such block.
    """
    for name in names:
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"there is no block {name}")
        content = BLOCKS[name]()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def benchmark_tables() -> dict[Path, str]:
    """The table beside each benchmark's JSON file that has one."""
    reports = {path: read(f"docs/benchmarks/{path.name}") for path in sorted(REPOSITORY.glob("docs/benchmarks/*.json"))}
    return {path.with_suffix(".md"): table(report) for path, report in reports.items() if "columns" in report}


def main() -> int:
    """Fill, or check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where something is out of date")
    arguments = parser.parse_args()
    made = {
        REPOSITORY / document: fill((REPOSITORY / document).read_text(encoding="utf-8"), names)
        for document, names in DOCUMENTS.items()
    }
    stale = []
    for path, text in (made | benchmark_tables()).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
