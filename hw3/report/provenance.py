"""The record: hardware, time, disk, versions, contents' hashes, and the commands that make it all again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hw3.common.disk import gib
from hw3.config.recipe import prompt_file
from hw3.evaluation.results import Results
from hw3.report.blocks import Block, Code, Facts, Heading, Section, Table
from hw3.report.formatting import plural, seconds
from hw3.report.run_data import Run
from hw3.runs.run_dir import RECIPE, portable


def record_section(runs: list[Run], out: Path) -> Section:
    """Hardware, time, disk, versions and commands of every run."""
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(run.name))
        blocks += [Facts(_facts(run)), *_sessions(run)]
    commands = [command for run in runs for command in _commands(run)]
    target = "" if out.resolve() == runs[0].folder.resolve() else f" --out {shlex.quote(portable(out))}"
    commands.append(f"hw3 report {' '.join(shlex.quote(run.name) for run in runs)}{target}")
    blocks += [
        Heading("Commands"),
        Code("What makes all of this again, from the repository's root", "\n".join(commands)),
    ]
    for run in runs:
        title = "The recipe as run" + (f": {run.name}" if len(runs) > 1 else "")
        blocks.append(Code(title, run.recipe.to_yaml(), folded=True, chinese=True))
    return Section("record", "Record", "Hardware, time, disk, versions and the exact commands.", blocks)


def _facts(run: Run) -> list[tuple[str, str]]:
    manifest = run.manifest
    facts: list[tuple[str, str]] = []
    if manifest:
        layout, sessions = manifest["layout"], manifest["sessions"]
        facts += [
            ("device", "CPU" if manifest["device"] == "cpu" else manifest["device"]),
            (
                "layout",
                f"{plural(layout['processes'], 'process', 'processes')}, each "
                f"{plural(layout['rows_per_device'], 'row')} × {layout['accumulation']} a step",
            ),
        ]
        total = sum(session["seconds"] for session in sessions)
        steps = sum(session["to_step"] - session["from_step"] for session in sessions)
        if sessions:
            facts.append(
                (
                    "training time",
                    f"{seconds(total)} for {plural(steps, 'step')}, in {plural(len(sessions), 'session')}",
                )
            )
        peaks = [session["peak_gib"] for session in sessions if "peak_gib" in session]
        if peaks:
            facts.append(("GPU memory, training", f"{max(peaks):.2f} GiB at most"))
    scored = [entry for results in _all(run) for entry in results.entries]
    if scored:
        facts.append(
            (
                "scoring time",
                f"{seconds(sum(e['seconds'] for e in scored))} for {plural(len(scored), 'entry', 'entries')}",
            )
        )
    answered = [one.quality for one in run.predictions]
    if answered:
        rates = [quality["rows_per_second"] for quality in answered]
        rate = f"{min(rates):.1f}" if len(rates) == 1 else f"{min(rates):.1f} to {max(rates):.1f}"
        took = seconds(sum(quality["seconds"] for quality in answered))
        facts.append(
            ("generation time", f"{took} for {plural(len(answered), 'file')} of answers, {rate} rows a second")
        )
    if run.checkpoints:
        total, weights = run.disk
        facts.append(
            ("disk", f"{gib(total)} for {plural(len(run.checkpoints), 'checkpoint')}; {gib(weights)} of weights each")
        )
    if manifest:
        versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
        facts += [
            ("versions", f"Python {manifest['python']}, {versions}"),
            ("commit", manifest["git_commit"] or "not recorded"),
            ("begun", manifest["started"]),
        ]
    settings = None if run.results is None else run.results.head["settings"]
    if settings is not None:
        facts.append(
            (
                "scored in",
                f"{settings['dtype']}, {settings['attn_implementation'] or 'default'} attention, "
                + (
                    "dequantized once"
                    if settings["dequantized"]
                    else "quantized"
                    if settings["quantization"]
                    else "unquantized"
                ),
            )
        )
        facts.append(("bootstrap", f"{settings['bootstrap_samples']:,} samples, seed {settings['bootstrap_seed']}"))
    for name, sha256 in _hashes(run):
        facts.append((f"sha256 of {name}", sha256))
    return facts


def _hashes(run: Run) -> list[tuple[str, str]]:
    manifest = run.manifest
    found = []
    if manifest:
        found = [("the base", manifest["base"]["sha256"]), ("the tokenizer", manifest["tokenizer_sha256"])]
        found += [(file["path"], file["sha256"]) for file in manifest["data"].values()]
    known = {sha256 for _, sha256 in found}
    found += [
        (r.head["data"]["path"], r.head["data"]["sha256"]) for r in _all(run) if r.head["data"]["sha256"] not in known
    ]
    return [*found, ("the prompt", run.recipe.prompt.sha256)]


def _sessions(run: Run) -> list[Block]:
    sessions = run.manifest.get("sessions", [])
    if len(sessions) < 2:
        return []
    rows: list[list[Any]] = [
        [s["began"], f"{s['from_step']:,}", f"{s['to_step']:,}", seconds(s["seconds"]), str(s["processes"])]
        for s in sessions
    ]
    return [Table("Sessions of training", ["begun", "from step", "to step", "time", "processes"], rows)]


def _all(run: Run) -> list[Results]:
    return [*([] if run.results is None else [run.results]), *run.others]


# --- commands --------------------------------------------------------------------------------------------------------


def evaluate_command(run: Run, *, base_only: bool = False) -> str:
    """The command that scores a run, or its base with worked examples."""
    words = ["hw3", "eval", run.name]
    if base_only:
        examples = len(run.recipe.prompt.examples)
        shots = [str(number) for number in (0, 1, 2, 4) if number <= examples] if examples else ["0", "1", "2", "4"]
        words += ["--base-only", "--shots", *shots, *([] if examples else ["--examples", "train"])]
    return shlex.join(words)


def predict_command(run: Run, name: str) -> str:
    """The command that answers a run's rows with one system: `base`, `base+4` or `checkpoint-100`."""
    stem, _, shots = name.partition("+")
    words = ["hw3", "predict", run.name, run.recipe.data.eval, "--checkpoint", stem]
    return shlex.join([*words, *(["--shots", shots] if shots else [])])


def _commands(run: Run) -> list[str]:
    commands = []
    if run.manifest:
        processes = run.manifest["layout"]["processes"]
        train = shlex.join(["train", f"{run.name}/{RECIPE}", "--run", run.name])
        if processes > 1:
            config = "cpu2" if run.manifest["device"] == "cpu" else "ddp"
            launch = f"accelerate launch --config_file accelerate_configs/{config}.yaml --num_processes {processes}"
            commands.append(f"{launch} -m hw3 {train}")
        else:
            commands.append(f"hw3 {train}")
    main, dev = run.results, run.recipe.data.dev
    for results in _all(run):
        path = results.head["data"]["path"]
        if results is not main and dev is not None and path in (portable(Path(dev)), Path(dev).name):
            continue  # the main file's command scores it as well
        commands += _evaluations(run, results, [] if results is main else ["--data", path])
    return commands + [predict_command(run, one.name) for one in run.predictions]


def _evaluations(run: Run, results: Results, data: list[str]) -> list[str]:
    """One command for tuned entries and one for the base's further ones, by prompt and source of examples."""
    groups: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for entry in results.entries:
        key = (entry["prompt"]["sha256"], entry["prompt"]["name"], bool(entry["example_ids"]))
        groups.setdefault(key, []).append(entry)
    commands = []
    ordered = sorted(groups.items(), key=lambda item: (item[0][0] != results.recipe_prompt, item[0][1:]))
    for (sha256, name, drawn), entries in ordered:
        file = prompt_file(sha256)
        other = ["--prompt", f"{name}.yaml" if file is None else file[0].as_posix()]
        prompt = [] if sha256 == results.recipe_prompt else other
        words = ["hw3", "eval", run.name, *data, *prompt, *(["--examples", "train"] if drawn else [])]
        tuned = sorted({entry["shots"] for entry in entries if entry["checkpoint"] is not None})
        base = sorted({entry["shots"] for entry in entries if entry["checkpoint"] is None})
        adapters = sorted({entry["checkpoint"] for entry in entries} - {None})
        adapters = [name for name in adapters if not name.startswith("checkpoint-")]
        if tuned:
            beside = ["--adapter", *adapters] if adapters else []
            commands.append(shlex.join([*words, *beside, *([] if tuned == [0] else ["--shots", *map(str, tuned)])]))
        if set(base) - set(tuned):
            commands.append(shlex.join([*words, "--base-only", "--shots", *map(str, base)]))
    return commands
