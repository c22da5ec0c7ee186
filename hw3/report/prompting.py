"""The second question: the un-tuned model with no and a few worked examples, against the tuned one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hw3.common.hashing import file_sha256
from hw3.config.recipe import prompt_file
from hw3.data.prompt import PLACEHOLDER, Example, Prompt, messages, render
from hw3.data.rows import read_rows
from hw3.data.templates import direction_of
from hw3.evaluation.results import entry_name
from hw3.report.blocks import Block, Code, Heading, Missing, Table, Text
from hw3.report.formatting import CI, DIRECTIONS, INTO, certain, difference, figure, score, shots
from hw3.report.provenance import evaluate_command
from hw3.report.run_data import Run, pair_of
from hw3.report.svg import interval_scale


def prompting(run: Run) -> list[Block]:
    command = evaluate_command(run, base_only=True)
    if run.results is None:
        return [Missing(f"{run.recipe.data.eval} has not been scored.", [command])]
    shown = untuned_and_best(run)
    untuned = [entry for entry in shown if entry["checkpoint"] is None]
    blocks: list[Block] = []
    if not any(entry["shots"] for entry in run.untuned):
        blocks.append(Missing("The un-tuned model has not been scored with worked examples.", [command]))
    if not shown:
        return blocks
    blocks += [*_examples_in_words(run, untuned), Heading("Scores")]
    blocks += scores(run, shown)
    blocks += [*_comparison_in_words(run), Heading("The prompts"), *_prompts(run, shown)]
    return blocks


def scores(run: Run, shown: list[dict[str, Any]]) -> list[Block]:
    """The table of entries, each compared row by row with the tuned model."""
    best = run.best
    reference = best or run.zero_shot or shown[0]
    against = "the tuned model" if reference is best else entry_name(reference)
    draw = interval_scale(shown)
    several = len({entry["prompt"]["sha256"] for entry in shown}) > 1
    rows: list[list[Any]] = []
    for entry in shown:
        pair = None if entry is reference else pair_of(run, reference, entry)
        directions = [entry["by_direction"].get(key) for key in ("m2c", "c2m")]
        rows.append(
            [
                ("un-tuned, " if entry["checkpoint"] is None else f"{entry['checkpoint']}, ") + shots(entry),
                *([entry["prompt"]["name"]] if several else []),
                draw(entry),
                score(entry),
                *("" if group is None else figure(group["mean_perplexity"]) for group in directions),
                *(["", ""] if pair is None else [difference(pair), f"{pair.better} / {pair.worse}"]),
            ]
        )
    head = ["model", *(["prompt"] if several else []), "", f"mean perplexity {CI}", INTO["m2c"], INTO["c2m"]]
    head += [f"minus {against} {CI}", "rows better / worse"]
    strong = {number for number, entry in enumerate(shown) if entry is best}
    blocks: list[Block] = [
        Table("Zero-shot, few-shot and tuned, on the same rows", head, rows, strong, texts=2 + several)
    ]
    blocks.append(
        Text(
            "Differences are paired: the mean over rows of one perplexity minus the other's, with a bootstrap interval "
            "over the same rows. An interval without 0 is a difference.",
            aside=True,
        )
    )
    return blocks


def untuned_and_best(run: Run) -> list[dict[str, Any]]:
    """The base under every prompt, the recipe's first, the best checkpoint likewise, and adapters from elsewhere."""
    assert run.results is not None
    own = run.results.recipe_prompt
    entries = sorted(
        run.results.entries,
        key=lambda entry: (entry["prompt"]["sha256"] != own, entry["prompt"]["name"], bool(entry["example_ids"])),
    )
    untuned = [entry for entry in entries if entry["checkpoint"] is None]
    tuned = [entry for entry in entries if entry["checkpoint"] is not None]
    best = [entry for entry in tuned if run.best is not None and entry["checkpoint"] == run.best["checkpoint"]]
    return [*untuned, *best, *(entry for entry in tuned if not entry["checkpoint"].startswith("checkpoint-"))]


def _examples_in_words(run: Run, untuned: list[dict[str, Any]]) -> list[Block]:
    blocks: list[Block] = [Heading("How the examples were chosen")]
    listed = sorted({entry["shots"] for entry in untuned if entry["shots"] and not entry["example_ids"]})
    examples = run.recipe.prompt.examples
    if listed:
        first = " or ".join([", ".join(map(str, listed[:-1])), str(listed[-1])] if listed[1:] else [str(listed[0])])
        words = f"The first {first} of the {len(examples)} worked examples written into the recipe's prompt, in order"
        directions = [DIRECTIONS[direction_of(example.instruction) or "other"] for example in examples]
        words += f" ({', '.join(directions)})."
        if run.rows:
            scored = {text for row in run.rows.values() for text in (row.instruction, row.output)}
            taken = sum(example.instruction in scored or example.output in scored for example in examples)
            words += (
                " None of them is among the scored rows."
                if not taken
                else f" {taken} of them are among the scored rows, which flatters the few-shot scores."
            )
        blocks.append(Text(words))
    drawn = [entry for entry in untuned if entry["example_ids"]]
    if drawn:
        most = max(drawn, key=lambda entry: entry["shots"])
        blocks.append(
            Text(
                f"Drawn from {run.recipe.data.train} with seed {run.recipe.evaluation.examples_seed}: directions in"
                " turn, fewer examples a prefix of more, no row whose instruction or output is scored. Rows "
                f"{', '.join(most['example_ids'])}."
            )
        )
    return blocks if len(blocks) > 1 else []


def _comparison_in_words(run: Run) -> list[Block]:
    zero, few, best = run.zero_shot, run.few_shot, run.best
    words = []
    if zero is not None and few is not None:
        pair = pair_of(run, zero, few)
        change = "lowers" if pair.difference < 0 else "raises"
        words.append(
            f"The best number of worked examples, {few['shots']}, {change} the un-tuned score by "
            f"{figure(abs(pair.difference))}, from {figure(zero['mean_perplexity'])} to "
            f"{figure(few['mean_perplexity'])}"
            + (
                f" (better on {pair.better} of {few['rows']} rows)."
                if certain(pair)
                else ", which the interval does not tell from chance."
            )
        )
    prompted = few if few is not None and (zero is None or few["mean_perplexity"] < zero["mean_perplexity"]) else zero
    if best is not None and prompted is not None:
        pair = pair_of(run, prompted, best)
        words.append(
            f"Tuning brings it to {figure(best['mean_perplexity'])}: {difference(pair)} against the best prompt "
            f"without tuning, better on {pair.better} and worse on {pair.worse} of {best['rows']} rows."
        )
    return [Text(" ".join(words))] if words else []


def _prompts(run: Run, shown: list[dict[str, Any]]) -> list[Block]:
    """Every prompt that was scored, as the model saw it, once."""
    blocks: list[Block] = []
    seen = set()
    drawn = _drawn_examples(run)
    for entry in shown:
        key = (entry["prompt"]["sha256"], entry["shots"], tuple(entry["example_ids"] or ()))
        if key in seen:
            continue
        seen.add(key)
        title = f"Prompt {entry['prompt']['name']}, {shots(entry)}"
        prompt = run.recipe.prompt
        if entry["prompt"]["sha256"] != prompt.sha256:
            file = prompt_file(entry["prompt"]["sha256"])
            if file is None:
                blocks.append(Text(f"{title}: its file is not in recipes/prompts any more.", aside=True))
                continue
            prompt = file[1]
        if entry["example_ids"]:
            examples = [drawn[id] for id in entry["example_ids"] if id in drawn]
        else:
            examples = (prompt.examples or run.recipe.prompt.examples)[: entry["shots"]]
        if len(examples) < entry["shots"]:
            blocks.append(Text(f"{title}: its examples' file is not here as it was.", aside=True))
            continue
        blocks.append(prompt_code(title, prompt, examples, folded=True))
    return blocks


def _drawn_examples(run: Run) -> dict[str, Example]:
    """Training rows by id, where the training file is still the one of the manifest."""
    path, known = Path(run.recipe.data.train), run.manifest.get("data", {}).get("train")
    if known is None or not path.is_file() or file_sha256(path) != known["sha256"]:
        return {}
    return {row.id: Example(instruction=row.instruction, output=row.output or "") for row in read_rows(path)}


def prompt_code(title: str, prompt: Prompt, examples: list[Example], *, folded: bool) -> Code:
    if not prompt.chat_template:
        return Code(title, render(prompt, PLACEHOLDER, examples), folded, chinese=True)
    turns = messages(prompt, PLACEHOLDER, examples)
    text = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in turns)
    return Code(f"{title}: messages, put into the tokenizer's chat template", text, folded, chinese=True)
