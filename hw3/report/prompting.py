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
from hw3.report.language import join_sentences, tr
from hw3.report.run_data import RunData, compare_entries
from hw3.report.svg import interval_drawer
from hw3.runs.results_file import ScoreEntry


def prompting_blocks(run: RunData) -> list[Block]:
    """Return the blocks of question 2 for one run."""
    command = eval_command(run, base_only=True)
    if run.results is None:
        return [Missing(tr("{file} has not been scored yet.", file=run.recipe.data.eval), [command])]
    entries = entries_to_compare(run)
    blocks: list[Block] = []
    if run.best_few_shot is None:
        blocks.append(Missing(tr("The base model has not been scored with few-shot examples yet."), [command]))
    if not entries:
        return blocks
    own = [entry for entry in entries if entry.prompt.sha256 == run.recipe.prompt.sha256]
    return [
        *blocks,
        *_examples_blocks(run, [entry for entry in entries if entry.is_base]),
        Heading(tr("Scores")),
        *scores_blocks(run, own or entries),
        *([] if len(own) == len(entries) else _ranking_blocks(run, entries)),
        *_conclusion_blocks(run, entries),
        Heading(tr("The prompts")),
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
    reference_name = tr("the fine-tuned model") if reference is run.best else reference.label
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
    header = [tr("model"), *([tr("prompt")] if has_prompts else []), "", f"{tr('mean perplexity')} {CI}"]
    header += [tr(SHORT_GROUP_NAMES["m2c"]), tr(SHORT_GROUP_NAMES["c2m"])]
    header += [f"{tr('difference from {name}', name=reference_name)} {CI}", tr("rows better / worse")]
    highlighted = {index for index, entry in enumerate(entries) if entry is run.best}
    return [
        Table(
            tr("Zero-shot, few-shot and fine-tuned, on the same rows"),
            header,
            rows,
            highlighted,
            text_columns=3 if has_prompts else 2,
        ),
        Text(
            tr(
                "How to read it: each point is a mean perplexity on a log scale, and its line the 95% confidence "
                "interval. Differences are paired: a model's perplexity minus that of {reference}, row by row, "
                "averaged over the rows. Their intervals come from a bootstrap over the same rows. A difference is "
                "significant if its interval does not contain 0.",
                reference=reference_name,
            ),
            is_note=True,
        ),
    ]


def _ranking_blocks(run: RunData, entries: list[ScoreEntry]) -> list[Block]:
    """Return a table of entries under several prompts, the best first, each compared with the best row by row."""
    ranked = sorted(entries, key=lambda entry: entry.mean_perplexity)
    draw_interval = interval_drawer(ranked)
    rows = [
        [
            entry.prompt.name,
            format_model(entry),
            draw_interval(entry),
            format_score(entry),
            *format_comparison(None if entry is ranked[0] else compare_entries(run, ranked[0], entry)),
            "" if entry.prompt_tokens is None else f"{entry.prompt_tokens / entry.rows:,.0f}",
        ]
        for entry in ranked
    ]
    header = [tr("prompt"), tr("model"), "", f"{tr('mean perplexity')} {CI}"]
    header += [f"{tr('difference from {name}', name=ranked[0].prompt_label)} {CI}", tr("rows better / worse")]
    return [
        Table(tr("Prompts, the best first"), [*header, tr("tokens per prompt")], rows, {0}, text_columns=3),
        Text(
            tr(
                "Tokens per prompt are a mean over the rows: the prompt's own text, its few-shot examples and the "
                "instruction. The best of many prompts looks slightly better than it is, because it was selected on "
                "these rows."
            ),
            is_note=True,
        ),
    ]


def prompt_block(title: str, prompt: Prompt, examples: list[Example], *, is_collapsed: bool = False) -> Code:
    """Return a prompt as the model sees it, with a placeholder for the instruction."""
    if not prompt.chat_template:
        return Code(title, render_prompt(prompt, PLACEHOLDER, examples), is_collapsed, is_chinese=True)
    messages = build_messages(prompt, PLACEHOLDER, examples)
    text = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
    return Code(
        tr("{title}: messages for the tokenizer's chat template", title=title), text, is_collapsed, is_chinese=True
    )


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
    return [Heading(tr("How the examples were chosen")), *blocks] if blocks else []


def _describe_prompt_examples(run: RunData, shots: list[int]) -> str:
    examples = run.recipe.prompt.examples
    numbers = str(shots[-1])
    if shots[1:]:
        numbers = tr("{numbers} or {last}", numbers=tr(", ").join(map(str, shots[:-1])), last=shots[-1])
    directions = [tr(GROUP_NAMES[detect_direction(example.instruction) or "other"]) for example in examples]
    text = tr(
        "The few-shot prompts contain the first {numbers} of the {count} examples in the recipe's prompt. Their "
        "directions, in order: {directions}.",
        numbers=numbers,
        count=len(examples),
        directions=tr(", ").join(directions),
    )
    if not run.rows:
        return text
    scored = {text for row in run.rows.values() for text in (row.instruction, row.output)}
    leaked = sum(example.instruction in scored or example.output in scored for example in examples)
    if not leaked:
        return join_sentences(text, tr("None of the examples is among the scored rows."))
    warning = tr(
        "{count} of them are among the scored rows, which makes the few-shot scores look better than they are.",
        count=leaked,
    )
    return join_sentences(text, warning)


def _describe_sampled_examples(run: RunData, row_ids: list[str]) -> str:
    return tr(
        "Sampled examples were drawn from {file} with seed {seed}. The two directions alternate, and a smaller sample "
        "is always the beginning of a larger one. Rows whose instruction or output is among the scored rows were "
        "excluded. The sampled rows are {ids}.",
        file=run.recipe.data.train,
        seed=run.recipe.evaluation.examples_seed,
        ids=", ".join(row_ids),
    )


def _conclusion_blocks(run: RunData, entries: list[ScoreEntry]) -> list[Block]:
    """Return how much few-shot examples and fine-tuning change the score."""
    zero_shot, few_shot, best = run.zero_shot, run.best_few_shot, run.best
    sentences = []
    if zero_shot is not None and few_shot is not None:
        pair = compare_entries(run, zero_shot, few_shot)
        detail = tr("this difference is not significant")
        if pair.is_significant:
            detail = tr("{better} of {rows} rows improve", better=pair.better, rows=few_shot.rows)
        change = {"shots": few_shot.shots, "change": format_perplexity(abs(pair.difference)), "detail": detail}
        if pair.difference < 0:
            sentence = tr(
                "The best number of few-shot examples is {shots}. They lower the base model's mean perplexity by "
                "{change}; {detail}.",
                **change,
            )
        else:
            sentence = tr(
                "The best number of few-shot examples is {shots}. They raise the base model's mean perplexity by "
                "{change}; {detail}.",
                **change,
            )
        sentences.append(sentence)
    base_entries = [entry for entry in entries if entry.is_base]
    prompted = min(base_entries, key=lambda entry: entry.mean_perplexity, default=None)
    if best is not None and prompted is not None:
        pair = compare_entries(run, prompted, best)
        sentences.append(
            tr(
                "Compared with the best prompt for the base model, fine-tuning changes the mean perplexity by "
                "{difference}. The fine-tuned model is better on {better} rows and worse on {worse}.",
                difference=format_difference(pair),
                better=pair.better,
                worse=pair.worse,
            )
        )
    return [Text(join_sentences(*sentences))] if sentences else []


def _prompt_blocks(run: RunData, entries: list[ScoreEntry]) -> list[Block]:
    """Return every prompt that was scored, once."""
    sampled = _load_sampled_examples(run)
    unique: dict[tuple[str, int, tuple[str, ...]], ScoreEntry] = {}
    for entry in entries:
        unique.setdefault((entry.prompt.sha256, entry.shots, tuple(entry.example_ids or ())), entry)
    blocks: list[Block] = []
    for entry in unique.values():
        title = tr("Prompt {name}, {shots}", name=entry.prompt.name, shots=format_shots(entry))
        prompt: Prompt | None = run.recipe.prompt
        if entry.prompt.sha256 != run.recipe.prompt.sha256:
            found = find_prompt_file(entry.prompt.sha256)
            prompt = None if found is None else found[1]
        if prompt is None:
            blocks.append(Text(tr("{title}: its file is no longer in recipes/prompts.", title=title), is_note=True))
            continue
        if entry.example_ids:
            examples = [sampled[id] for id in entry.example_ids if id in sampled]
        else:
            examples = (prompt.examples or run.recipe.prompt.examples)[: entry.shots]
        if len(examples) < entry.shots:
            text = tr("{title}: the file with its examples is missing or has changed.", title=title)
            blocks.append(Text(text, is_note=True))
        else:
            blocks.append(prompt_block(title, prompt, examples, is_collapsed=True))
    return blocks


def _load_sampled_examples(run: RunData) -> dict[str, Example]:
    """Return the training rows as examples, by id; none if the training file has changed."""
    path = Path(run.recipe.data.train)
    if run.manifest is None or not path.is_file() or file_sha256(path) != run.manifest.data["train"].sha256:
        return {}
    return {row.id: Example(instruction=row.instruction, output=row.output or "") for row in read_rows(path)}
