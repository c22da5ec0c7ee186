"""Question 2: the base model with no and a few examples in its prompt, compared with the fine-tuned model."""

from __future__ import annotations

from pathlib import Path

from hw3.common.hashing import file_sha256
from hw3.config.recipe import find_prompt_file
from hw3.data.prompt import PLACEHOLDER, Example, Prompt, build_messages, render_prompt
from hw3.data.rows import read_rows
from hw3.data.templates import detect_direction
from hw3.report.blocks import Block, Code, Heading, Missing, Table, Text
from hw3.report.command_lines import eval_command
from hw3.report.formatting import (
    CI,
    GROUP_NAMES,
    SHORT_GROUP_NAMES,
    format_comparison,
    format_difference,
    format_model,
    format_perplexity,
    format_score,
    format_shots,
)
from hw3.report.run_data import RunData, compare_entries
from hw3.report.svg import interval_drawer
from hw3.runs.results_file import ScoreEntry


def prompting_blocks(run: RunData) -> list[Block]:
    """Return the blocks of question 2 for one run."""
    command = eval_command(run, base_only=True)
    if run.results is None:
        return [Missing(f"{run.recipe.data.eval} has not been scored yet.", [command])]
    entries = entries_to_compare(run)
    blocks: list[Block] = []
    if run.best_few_shot is None:
        blocks.append(Missing("The base model has not been scored with few-shot examples yet.", [command]))
    if not entries:
        return blocks
    return [
        *blocks,
        *_examples_blocks(run, [entry for entry in entries if entry.is_base]),
        Heading("Scores"),
        *scores_blocks(run, entries),
        *_conclusion_blocks(run),
        Heading("The prompts"),
        *_prompt_blocks(run, entries),
    ]


def entries_to_compare(run: RunData) -> list[ScoreEntry]:
    """Return the entries of the base model, the best checkpoint and adapters from elsewhere.

    All prompts are included; the recipe's comes first.
    """
    assert run.results is not None
    prompt_sha256 = run.results.prompt_sha256
    entries = sorted(
        run.results.entries,
        key=lambda entry: (entry.prompt.sha256 != prompt_sha256, entry.prompt.name, bool(entry.example_ids)),
    )
    base = [entry for entry in entries if entry.is_base]
    best = [entry for entry in entries if run.best is not None and entry.checkpoint == run.best.checkpoint]
    return [*base, *best, *(entry for entry in entries if not entry.is_base and not entry.is_run_checkpoint)]


def scores_blocks(run: RunData, entries: list[ScoreEntry]) -> list[Block]:
    """Return a table of entries, each compared row by row with the fine-tuned model.

    Args:
        run: the run.
        entries: entries of the run. Without a fine-tuned model, they are compared with the base model.
    """
    reference = run.best or run.zero_shot or entries[0]
    reference_name = "the fine-tuned model" if reference is run.best else reference.label
    draw_interval = interval_drawer(entries)
    has_prompts = len({entry.prompt.sha256 for entry in entries}) > 1
    rows = []
    for entry in entries:
        comparison = format_comparison(None if entry is reference else compare_entries(run, reference, entry))
        directions = [entry.by_direction.get(key) for key in ("m2c", "c2m")]
        rows.append(
            [
                format_model(entry),
                *([entry.prompt.name] if has_prompts else []),
                draw_interval(entry),
                format_score(entry),
                *("" if group is None else format_perplexity(group.mean_perplexity) for group in directions),
                *comparison,
            ]
        )
    header = ["model", *(["prompt"] if has_prompts else []), "", f"mean perplexity {CI}"]
    header += [SHORT_GROUP_NAMES["m2c"], SHORT_GROUP_NAMES["c2m"]]
    header += [f"difference from {reference_name} {CI}", "rows better / worse"]
    highlighted = {index for index, entry in enumerate(entries) if entry is run.best}
    return [
        Table(
            "Zero-shot, few-shot and fine-tuned, on the same rows",
            header,
            rows,
            highlighted,
            text_columns=3 if has_prompts else 2,
        ),
        Text(
            f"Differences are paired: a model's perplexity minus that of {reference_name}, row by row, averaged over "
            "the rows. Their intervals come from a bootstrap over the same rows. A difference is significant if its "
            "interval does not contain 0.",
            is_note=True,
        ),
    ]


def prompt_block(title: str, prompt: Prompt, examples: list[Example], *, is_collapsed: bool = False) -> Code:
    """Return a prompt as the model sees it, with a placeholder for the instruction."""
    if not prompt.chat_template:
        return Code(title, render_prompt(prompt, PLACEHOLDER, examples), is_collapsed, is_chinese=True)
    messages = build_messages(prompt, PLACEHOLDER, examples)
    text = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
    return Code(f"{title}: messages for the tokenizer's chat template", text, is_collapsed, is_chinese=True)


def _examples_blocks(run: RunData, base_entries: list[ScoreEntry]) -> list[Block]:
    """Return how the few-shot examples were chosen."""
    shots = sorted({entry.shots for entry in base_entries if entry.shots and not entry.example_ids})
    sampled = [entry for entry in base_entries if entry.example_ids]
    blocks: list[Block] = []
    if shots:
        blocks.append(Text(_describe_prompt_examples(run, shots)))
    if sampled:
        most = max(sampled, key=lambda entry: entry.shots)
        blocks.append(Text(_describe_sampled_examples(run, most.example_ids or [])))
    return [Heading("How the examples were chosen"), *blocks] if blocks else []


def _describe_prompt_examples(run: RunData, shots: list[int]) -> str:
    examples = run.recipe.prompt.examples
    numbers = " or ".join([", ".join(map(str, shots[:-1])), str(shots[-1])] if shots[1:] else [str(shots[0])])
    directions = [GROUP_NAMES[detect_direction(example.instruction) or "other"] for example in examples]
    text = (
        f"The few-shot prompts contain the first {numbers} of the {len(examples)} examples in the recipe's prompt. "
        f"Their directions, in order: {', '.join(directions)}."
    )
    if not run.rows:
        return text
    scored = {text for row in run.rows.values() for text in (row.instruction, row.output)}
    leaked = sum(example.instruction in scored or example.output in scored for example in examples)
    if not leaked:
        return f"{text} None of the examples is among the scored rows."
    return (
        f"{text} {leaked} of them are among the scored rows, which makes the few-shot scores look better than they are."
    )


def _describe_sampled_examples(run: RunData, row_ids: list[str]) -> str:
    return (
        f"Sampled examples were drawn from {run.recipe.data.train} with seed {run.recipe.evaluation.examples_seed}. "
        "The two directions alternate, and a smaller sample is always the beginning of a larger one. Rows whose "
        f"instruction or output is among the scored rows were excluded. The sampled rows are {', '.join(row_ids)}."
    )


def _conclusion_blocks(run: RunData) -> list[Block]:
    """Return how much few-shot examples and fine-tuning change the score."""
    zero_shot, few_shot, best = run.zero_shot, run.best_few_shot, run.best
    sentences = []
    if zero_shot is not None and few_shot is not None:
        pair = compare_entries(run, zero_shot, few_shot)
        verb = "lower" if pair.difference < 0 else "raise"
        detail = (
            f"{pair.better} of {few_shot.rows} rows improve"
            if pair.is_significant
            else "this difference is not significant"
        )
        sentences.append(
            f"The best number of few-shot examples is {few_shot.shots}. They {verb} the base model's mean perplexity "
            f"by {format_perplexity(abs(pair.difference))}; {detail}."
        )
    prompted = min(
        (entry for entry in (zero_shot, few_shot) if entry is not None),
        key=lambda entry: entry.mean_perplexity,
        default=None,
    )
    if best is not None and prompted is not None:
        pair = compare_entries(run, prompted, best)
        sentences.append(
            "Compared with the best prompt for the base model, fine-tuning changes the mean perplexity by "
            f"{format_difference(pair)}. The fine-tuned model is better on {pair.better} rows and worse on "
            f"{pair.worse}."
        )
    return [Text(" ".join(sentences))] if sentences else []


def _prompt_blocks(run: RunData, entries: list[ScoreEntry]) -> list[Block]:
    """Return every prompt that was scored, once."""
    sampled = _load_sampled_examples(run)
    unique: dict[tuple[str, int, tuple[str, ...]], ScoreEntry] = {}
    for entry in entries:
        unique.setdefault((entry.prompt.sha256, entry.shots, tuple(entry.example_ids or ())), entry)
    blocks: list[Block] = []
    for entry in unique.values():
        title = f"Prompt {entry.prompt.name}, {format_shots(entry)}"
        prompt: Prompt | None = run.recipe.prompt
        if entry.prompt.sha256 != run.recipe.prompt.sha256:
            found = find_prompt_file(entry.prompt.sha256)
            prompt = None if found is None else found[1]
        if prompt is None:
            blocks.append(Text(f"{title}: its file is no longer in recipes/prompts.", is_note=True))
            continue
        if entry.example_ids:
            examples = [sampled[id] for id in entry.example_ids if id in sampled]
        else:
            examples = (prompt.examples or run.recipe.prompt.examples)[: entry.shots]
        if len(examples) < entry.shots:
            blocks.append(Text(f"{title}: the file with its examples is missing or has changed.", is_note=True))
        else:
            blocks.append(prompt_block(title, prompt, examples, is_collapsed=True))
    return blocks


def _load_sampled_examples(run: RunData) -> dict[str, Example]:
    """Return the training rows as examples, by id; none if the training file has changed."""
    path = Path(run.recipe.data.train)
    if run.manifest is None or not path.is_file() or file_sha256(path) != run.manifest.data["train"].sha256:
        return {}
    return {row.id: Example(instruction=row.instruction, output=row.output or "") for row in read_rows(path)}
