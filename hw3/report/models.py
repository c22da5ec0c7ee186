"""The third question: a second model beside the first."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hw3.report.blocks import Block, Heading, Missing, Table, Text
from hw3.report.formatting import CI, difference, figure, score, share
from hw3.report.prompting import scores, untuned_and_best
from hw3.report.provenance import evaluate_command
from hw3.report.run_data import Run, pair_of, same_rows
from hw3.report.tuning import final, learning_curve, method


def models(main: Run, others: list[Run], out: Path) -> list[Block]:
    if not others:
        return [
            Missing(
                "This report has one base. Train and score a second one, and name both runs:",
                [
                    "make train MODEL=llama && make eval MODEL=llama && make shots MODEL=llama",
                    f"hw3 report {shlex.quote(main.name)} outputs/llama-qlora",
                ],
            )
        ]
    runs = [main, *others]
    rows: list[list[Any]] = []
    for run in runs:
        parameters = run.manifest.get("parameters")
        few, zero, best = run.few_shot, run.zero_shot, run.best
        rows.append(
            [
                run.name,
                run.base,
                "—" if parameters is None else f"{parameters['total']:,}",
                "—" if parameters is None else f"{parameters['trained']:,}",
                "—" if zero is None else figure(zero["mean_perplexity"]),
                "—" if few is None else f"{figure(few['mean_perplexity'])} ({few['shots']})",
                "—" if best is None else score(best),
                "—" if best is None else f"{best['step']:,}",
                "—" if best is None else f"{best['bits_per_character']:.3f}",
            ]
        )
    head = ["run", "base", "parameters", "trained", "zero-shot", "few-shot (examples)", f"tuned {CI}", "step"]
    blocks: list[Block] = [Table("Models side by side", [*head, "bits a character, tuned"], rows, texts=2)]
    for run in others:
        blocks += [
            Text(_models_in_words(main, run)),
            Heading(run.name),
            *method(run),
            *final(run),
            *learning_curve(run, out),
        ]
        if run.results is not None and (shown := untuned_and_best(run)):
            blocks += scores(run, shown)
        else:
            blocks.append(Missing("Its base has not been scored.", [evaluate_command(run, base_only=True)]))
    return blocks


def _models_in_words(main: Run, run: Run) -> str:
    """What may be compared between two runs of different bases, and how they compare."""
    if main.best is None or run.best is None:
        return f"{run.name} and {main.name} cannot be compared before both have a scored checkpoint."
    if not same_rows(main, run):
        return f"{run.name} was scored on other rows than {main.name}: their scores cannot be compared."
    assert main.results is not None and run.results is not None
    if main.results.head["settings"]["tokenizer_sha256"] == run.results.head["settings"]["tokenizer_sha256"]:
        pair = pair_of(main, main.best, run.best, run)
        return (
            f"{run.name} and {main.name} have one tokenizer, so their perplexities can be compared: {difference(pair)}"
            f", better on {pair.better} and worse on {pair.worse} of {run.best['rows']} rows."
        )
    bits = run.best["bits_per_character"], main.best["bits_per_character"]
    return (
        f"{run.name} and {main.name} have different tokenizers, so their perplexities, which are means over tokens, "
        f"cannot be compared; bits a character can: {bits[0]:.3f} against {bits[1]:.3f}, "
        f"{share(abs(bits[0] / bits[1] - 1))} {'fewer' if bits[0] < bits[1] else 'more'}."
    )
