"""The answers: figures of quality, and every row with what each system made of it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

from hw3.data.templates import direction_of
from hw3.evaluation.results import entry_name
from hw3.report.blocks import Answer, Answers, Block, Card, Facts, Heading, Missing, Section, Table, Text
from hw3.report.formatting import DIRECTIONS, INTO, share, spread_of
from hw3.report.provenance import predict_command
from hw3.report.run_data import Predictions, Run, same_rows

SAMPLE = 10  # rows that Markdown shows
QUALITY = [
    ("BLEU", "character BLEU-4 by sacrebleu, 0 to 100: runs of one to four characters shared with the reference"),
    ("chrF", "chrF2 by sacrebleu, 0 to 100: runs of up to six characters; what is missed counts twice"),
    ("exact", "share of answers that are the reference"),
    ("copied", "share of answers that are the sentence that was to be translated"),
    ("length", "characters of the answers over characters of the references"),
    ("unfinished", "share of answers that had not ended when the room for them did"),
]


@dataclass(frozen=True)
class System:
    """One column of the comparison: an entry's row scores, a file of answers, or both."""

    label: str
    perplexities: dict[str, float]
    outputs: dict[str, str]
    cut: frozenset[str]


def answers_section(runs: list[Run]) -> Section:
    """Quality of the answers, then the rows themselves."""
    main = runs[0]
    compared = [run for run in runs if same_rows(main, run)]
    blocks: list[Block] = []
    for run in compared or [main]:
        if missing := _missing(run):
            text = "There are no answers to read yet, only perplexities of the references"
            if run.predictions:
                text = f"Not there yet: the answers of {' and '.join(missing)}"
            whose = "" if len(compared) < 2 else f"{run.name}: "
            blocks.append(Missing(f"{whose}{text}.", [predict_command(run, name) for name in missing]))
    blocks += [Text(note, aside=True) for run in compared for note in run.notes]
    blocks += _quality(compared)
    blocks += _comparison(compared)
    return Section(
        "answers",
        "Answers",
        "Perplexity ranks checkpoints; people read translations.",
        blocks,
    )


def _missing(run: Run) -> list[str]:
    """The best checkpoint, the base and the base with its best worked examples, as far as they have not answered."""
    wanted = [entry_name(entry) for entry in (run.best, run.zero_shot, _few_shot(run)) if entry is not None]
    answered = {one.name for one in run.predictions}
    unscored = [*(checkpoint.name for checkpoint in run.checkpoints[-1:]), "base"]
    return [name for name in wanted or unscored if name not in answered]


def _few_shot(run: Run) -> dict[str, Any] | None:
    """The base's best entry with worked examples; answers are made with the prompt's own, so drawn ones are not."""
    few = [entry for entry in run.untuned if entry["shots"] and not entry["example_ids"]]
    return min(few, key=lambda entry: entry["mean_perplexity"], default=None)


def _quality(runs: list[Run]) -> list[Block]:
    rows: list[list[Any]] = []
    copied: list[list[Any]] = []
    for run in runs:
        for one in run.predictions:
            for group in _groups(one):
                rows.append([_label(runs, run, one.name), INTO[group], *_figures(one.quality["groups"][group])])
            if not copied:
                baseline = one.quality["copy_input"]
                copied = [
                    ["the input, copied", INTO[group], *_figures(baseline[group], copying=True)]
                    for group in DIRECTIONS
                    if group in baseline
                ]
    if not rows:
        return []
    all_rows = [*copied, *rows]
    strong = {number for number, row in enumerate(all_rows) if row[1] == INTO["all"]}
    head = ["answers", "rows", "number", *(name for name, _ in QUALITY)]
    return [
        Heading("Quality"),
        Table("Quality of the answers, beside copying the input", head, all_rows, strong, texts=2),
        Facts(QUALITY),
    ]


def _groups(one: Predictions) -> list[str]:
    return [group for group in DIRECTIONS if group in one.quality["groups"]]


def _figures(figures: dict[str, Any], *, copying: bool = False) -> list[str]:
    return [
        f"{figures['rows']:,}",
        f"{figures['bleu']:.1f}",
        f"{figures['chrf']:.1f}",
        share(figures["exact_match"]),
        "" if copying else share(figures["copy_rate"]),
        f"{figures['length_ratio']:.2f}",
        "" if copying else share(figures["unfinished"]),
    ]


def _label(runs: list[Run], run: Run, name: str) -> str:
    """`base`, `checkpoint-100`; with the run's name where there are several."""
    return name if len(runs) == 1 else f"{run.name}: {name}"


def _systems(runs: list[Run]) -> list[System]:
    """The base without and with its best worked examples, the best checkpoint, and whatever has answered."""
    systems = []
    for run in runs:
        assert run.results is not None
        own = [entry for entry in run.results.entries if entry["prompt"]["sha256"] == run.results.recipe_prompt]
        # Answers are made with the prompt's own examples, so drawn ones are no part of this.
        by_name = {entry_name(entry): entry for entry in own if not entry["example_ids"]}
        outputs = {one.name: one.outputs for one in run.predictions}
        cut = {one.name: frozenset(one.quality.get("unfinished_ids", ())) for one in run.predictions}
        untuned = [entry_name(entry) for entry in (run.zero_shot, _few_shot(run)) if entry is not None]
        best = [] if run.best is None else [entry_name(run.best)]
        for name in dict.fromkeys([*untuned, *(name for name in outputs if name not in best), *best]):
            scores = run.results.rows[by_name[name]["key"]] if name in by_name else []
            perplexities = {score.id: score.perplexity for score in scores}
            systems.append(
                System(_label(runs, run, name), perplexities, outputs.get(name, {}), cut.get(name, frozenset()))
            )
    return systems


def _comparison(runs: list[Run]) -> list[Block]:
    systems = _systems(runs) if runs else []
    if not systems:
        return []
    main = runs[0]
    assert main.results is not None
    characters = {score.id: score.characters for score in next(iter(main.results.rows.values()))}
    by_perplexity = [number for number, system in enumerate(systems) if system.perplexities]
    orders = ["file order", "systems furthest apart first", "longest output first"]
    orders += [f"highest perplexity first: {systems[number].label}" for number in by_perplexity]
    gained: dict[str, float] = {}
    if main.zero_shot is not None and main.best is not None:
        orders.append("most gained from tuning first")
        before, after = (main.results.rows[entry["key"]] for entry in (main.zero_shot, main.best))
        gained = {a.id: math.log(b.perplexity / a.perplexity) for a, b in zip(after, before, strict=True)}
    cards = []
    for number, id in enumerate(characters):
        row = main.rows.get(id)
        perplexities = [systems[index].perplexities[id] for index in by_perplexity]
        keys = [float(number), -spread_of(perplexities), -float(characters[id]), *(-value for value in perplexities)]
        if gained:
            keys.append(-gained[id])
        reference = None if row is None else row.output
        cards.append(
            Card(
                id=id,
                direction="other" if row is None else direction_of(row.instruction) or "other",
                instruction=None if row is None else row.instruction,
                reference=reference,
                answers=[
                    Answer(
                        system.label,
                        system.perplexities.get(id),
                        None if id not in system.outputs else marked(reference, system.outputs[id]),
                        id in system.cut,
                    )
                    for system in systems
                ],
                keys=keys,
            )
        )
    sample = [cards[place] for place in evenly(len(cards), SAMPLE)]
    return [Heading("Row by row", "rows"), Answers(cards, orders, sample)]


def evenly(count: int, wanted: int) -> list[int]:
    """Places evenly spaced from the first of `count` to the last; all where there are no more than `wanted`.

    No fixed step: rows often come in pairs, and every other one would be of the same direction.
    """
    if count <= wanted:
        return list(range(count))
    return [round(number * (count - 1) / (wanted - 1)) for number in range(wanted)]


def marked(reference: str | None, output: str) -> list[tuple[str, bool]]:
    """An answer in pieces, each with whether the reference has it otherwise.

    Args:
        reference: what the answer is compared with; None marks nothing.
        output: the answer.
    """
    if reference is None:
        return [(output, False)]
    matcher = difflib.SequenceMatcher(None, reference, output, autojunk=False)
    return [
        (output[start:end], operation != "equal")
        for operation, _, _, start, end in matcher.get_opcodes()
        if end > start
    ]
