"""The report's sections: the homework's three questions in order, the answers, and the record of how it was done."""

from __future__ import annotations

from pathlib import Path

from hw3.report.blocks import Block, Section, Text, Tiles
from hw3.report.formatting import figure, interval, plural, shots
from hw3.report.models import models
from hw3.report.predictions import answers_section
from hw3.report.prompting import prompting
from hw3.report.provenance import record_section
from hw3.report.run_data import Run
from hw3.report.tuning import other_settings, tuning


def sections(runs: list[Run], out: Path) -> list[Section]:
    """All sections. The first run answers the questions; the others are what it is compared with.

    Args:
        runs: the runs, the main one first.
        out: the folder that the report goes to, for links.
    """
    main, others = runs[0], runs[1:]
    same_base = [run for run in others if run.base == main.base]
    return [
        Section(
            "tuning",
            "1. Data, tuning and the final score",
            "How much data was used, how the model was tuned, with which hyper-parameters, what it scores on the "
            "public set, and its learning curve.",
            [*tuning(main, out), *other_settings(main, same_base)],
        ),
        Section(
            "prompting",
            "2. Zero-shot and few-shot, against LoRA",
            "What the un-tuned model does with no and with a few worked examples in its prompt, how the examples were "
            "chosen, and how that compares with tuning.",
            prompting(main),
        ),
        Section(
            "models",
            "3. A second, larger model",
            "The same for another base, and how the two compare.",
            models(main, [run for run in others if run not in same_base], out),
        ),
        answers_section(runs),
        record_section(runs, out),
    ]


def lead(runs: list[Run]) -> list[Block]:
    """What stands above all sections: the score in a sentence and in figures."""
    run = runs[0]
    if run.results is None:
        return [Text(f"{run.name}: nothing has been scored on {run.recipe.data.eval} yet.")]
    tiles = []
    if run.best is not None:
        low_high = interval(run.best["mean_perplexity_ci95"])
        tiles.append((figure(run.best["mean_perplexity"]), f"tuned, step {run.best['step']:,}", f"95 % {low_high}"))
    few = run.few_shot
    for entry, name in ((few, "un-tuned, " + shots(few) if few else ""), (run.zero_shot, "un-tuned, zero-shot")):
        if entry is not None:
            low_high = interval(entry["mean_perplexity_ci95"])
            tiles.append((figure(entry["mean_perplexity"]), name, f"95 % {low_high}"))
    if run.best is not None:
        bits = f"{run.best['bits_per_character']:.3f}"
        tiles.append((bits, "bits a character, tuned", "comparable between tokenizers"))
    data = run.results.head["data"]
    return [
        Text(
            f"{run.base} on {data['path']}, {plural(data['rows'], 'row')}. The score is the mean over rows of the "
            "perplexity of the output and its end-of-sequence token, given the prompt: lower is better."
        ),
        Tiles(tiles),
    ]
