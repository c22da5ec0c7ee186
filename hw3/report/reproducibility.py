"""The last section: hardware, time, disk space, versions, hashes and commands."""

from __future__ import annotations

from pathlib import Path

from hw3.common.disk import format_bytes
from hw3.report.blocks import Block, Code, Facts, Heading, Section, Table
from hw3.report.command_lines import report_command, reproduction_commands
from hw3.report.formatting import format_count, format_duration
from hw3.report.language import tr
from hw3.report.run_data import RunData
from hw3.runs.manifest import Manifest, Session
from hw3.runs.results_file import ScoringSettings

Fact = tuple[str, str]


def build_reproducibility_section(runs: list[RunData], output_dir: Path, options: list[str]) -> Section:
    """Return what a reader needs to reproduce the runs, and the resources that they took.

    Args:
        runs: the runs.
        output_dir: the folder of the report.
        options: the other options of the report's command.
    """
    blocks: list[Block] = []
    for run in runs:
        if len(runs) > 1:
            blocks.append(Heading(run.name))
        blocks.append(Facts(_facts(run)))
        if run.manifest is not None and len(run.manifest.sessions) > 1:
            blocks.append(_sessions_table(run.manifest.sessions))
    commands = [command for run in runs for command in reproduction_commands(run)]
    commands.append(report_command(runs, output_dir, options))
    blocks += [
        Heading(tr("Commands")),
        Code(tr("To reproduce everything, run in the repository's root"), "\n".join(commands)),
    ]
    for run in runs:
        title = tr("The complete recipe of {run}", run=run.name) if len(runs) > 1 else tr("The complete recipe")
        blocks.append(Code(title, run.recipe.to_yaml(), is_collapsed=True, is_chinese=True))
    return Section(
        "reproducibility",
        tr("Reproducibility"),
        tr("Hardware, time, disk space, versions, and the exact commands."),
        blocks,
    )


def _facts(run: RunData) -> list[Fact]:
    facts: list[Fact] = []
    if run.manifest is not None:
        facts += _training_facts(run.manifest)
    facts += _inference_facts(run)
    if run.checkpoints:
        count = format_count(len(run.checkpoints), "checkpoint")
        facts.append(
            (
                tr("disk space"),
                tr(
                    "{size} for {count}; weights: {weights} each",
                    size=format_bytes(run.disk_bytes),
                    count=count,
                    weights=format_bytes(run.weight_bytes),
                ),
            )
        )
    if run.manifest is not None:
        facts += _version_facts(run.manifest)
    if run.results is not None:
        facts += _scoring_facts(run.results.settings)
    return facts + [(tr("SHA-256 of {name}", name=name), sha256) for name, sha256 in _hashes(run)]


def _training_facts(manifest: Manifest) -> list[Fact]:
    layout, sessions = manifest.layout, manifest.sessions
    facts = [
        (tr("device"), "CPU" if manifest.device == "cpu" else manifest.device),
        (
            tr("batch layout"),
            f"{format_count(layout.processes, 'process', 'processes')} × "
            f"{format_count(layout.rows_per_device, 'row')} × "
            f"{format_count(layout.accumulation, 'accumulation step')}",
        ),
    ]
    if sessions:
        seconds = sum(session.seconds for session in sessions)
        steps = sum(session.to_step - session.from_step for session in sessions)
        text = tr(
            "{duration} for {steps}, in {sessions}",
            duration=format_duration(seconds),
            steps=format_count(steps, "step"),
            sessions=format_count(len(sessions), "session"),
        )
        facts.append((tr("training time"), text))
    peaks = [session.peak_gib for session in sessions if session.peak_gib is not None]
    if peaks:
        facts.append((tr("peak GPU memory, training"), f"{max(peaks):.2f} GiB"))
    return facts


def _inference_facts(run: RunData) -> list[Fact]:
    facts = []
    entries = [entry for results in run.all_results for entry in results.entries]
    if entries:
        duration = format_duration(sum(entry.seconds for entry in entries))
        count = format_count(len(entries), "entry", "entries")
        facts.append((tr("scoring time"), tr("{duration} for {count}", duration=duration, count=count)))
    records = [predictions.record for predictions in run.predictions]
    if records:
        rates = [record.rows_per_second for record in records]
        rate = (
            f"{min(rates):.1f}" if len(rates) == 1 else tr("{low:.1f} to {high:.1f}", low=min(rates), high=max(rates))
        )
        duration = format_duration(sum(record.seconds for record in records))
        files = format_count(len(records), "file")
        text = tr(
            "{duration} for {files} of predictions, {rate} rows per second", duration=duration, files=files, rate=rate
        )
        facts.append((tr("generation time"), text))
    return facts


def _version_facts(manifest: Manifest) -> list[Fact]:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return [
        (tr("versions"), f"Python {manifest.python}, {versions}"),
        (tr("git commit"), manifest.git_commit or tr("not recorded")),
        (tr("started"), manifest.started),
    ]


def _scoring_facts(settings: ScoringSettings) -> list[Fact]:
    if settings.dequantized:
        weights = tr("4-bit weights dequantized")
    else:
        weights = tr("4-bit weights") if settings.quantization else tr("no quantization")
    attention = tr("{kind} attention", kind=settings.attn_implementation or tr("default"))
    return [
        (tr("scoring precision"), tr(", ").join((settings.dtype, attention, weights))),
        (
            tr("bootstrap"),
            tr("{samples:,} samples, seed {seed}", samples=settings.bootstrap_samples, seed=settings.bootstrap_seed),
        ),
    ]


def _hashes(run: RunData) -> list[Fact]:
    """Return the hashes of base model, tokenizer, data files and prompt."""
    hashes = []
    if run.manifest is not None:
        hashes = [
            (tr("the base model"), run.manifest.base.sha256),
            (tr("the tokenizer"), run.manifest.tokenizer_sha256),
        ]
        hashes += [(data.path, data.sha256) for data in run.manifest.data.values()]
    known = {sha256 for _, sha256 in hashes}
    scored = [results.data for results in run.all_results]
    hashes += [(data.path, data.sha256) for data in scored if data.sha256 not in known]
    return [*hashes, (tr("the prompt"), run.recipe.prompt.sha256)]


def _sessions_table(sessions: list[Session]) -> Table:
    rows = [
        [
            session.started,
            f"{session.from_step:,}",
            f"{session.to_step:,}",
            format_duration(session.seconds),
            str(session.processes),
        ]
        for session in sessions
    ]
    return Table(
        tr("Training sessions"),
        [tr("started"), tr("from step"), tr("to step"), tr("time"), tr("processes")],
        rows,
    )
