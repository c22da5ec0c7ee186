"""`hw3 eval`: which base, checkpoints, shots and prompts to score; one loaded base, adapters swapped, results kept."""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hw3.common.atomic_io import write_atomically
from hw3.common.distributed import gather, rank, world_size
from hw3.config.recipe import Recipe, load_prompt
from hw3.data.tokenization import EncodedRow, Encoder, count_unknown
from hw3.evaluation.batch_size import tokens_that_fit
from hw3.evaluation.bootstrap import bootstrap_interval, by_direction, by_length, heaviest
from hw3.evaluation.jobs import Job, entry_key, eval_datasets, select_examples
from hw3.evaluation.perplexity import RowScore, summarize
from hw3.evaluation.results_table import print_results
from hw3.evaluation.scorer import Scored, Scorer, merge_shards
from hw3.modeling.adapter_io import BadAdapter, ReadAhead
from hw3.modeling.logits import check_head
from hw3.runs.checkpoints import adapter_folder, complete_checkpoints, torn_checkpoints
from hw3.runs.open_run import encode_rows, holds_adapter, load_for_inference, open_run, prompt_name, recipe_of
from hw3.runs.resume import check_trained_as
from hw3.runs.run_dir import RECIPE, portable


def evaluate_run(
    run: Path,
    *,
    recipe_path: Path | None = None,
    data: Path | None = None,
    shots: list[int],
    prompts: list[Path] | None = None,
    base_only: bool = False,
    adapters: list[Path] | None = None,
    examples: str = "prompt",
    against: str | None = None,
    anyway: bool = False,
) -> int:
    """Score what has not been scored yet, print the table, write results and the learning curve.

    Args:
        run: the run folder.
        recipe_path: with `base_only`, the recipe to make the folder from, where there is none.
        data: rows to score; the recipe's `data.eval`, and its `data.dev` first, if None.
        shots: numbers of worked examples.
        prompts: further prompt files, scored beside the recipe's.
        base_only: leave the checkpoints out.
        adapters: further PEFT adapter folders, scored beside the run's checkpoints.
        examples: `prompt` for the prompt's worked examples, `train` to draw them from the training file.
        against: the checkpoint that all others are compared with, row by row; the best if None.
        anyway: score checkpoints that were trained under another prompt or quantization.

    Returns:
        0.

    Raises:
        UserError: there is no such run, or data, prompts, shots or checkpoints do not fit it.
    """
    recipe = recipe_of(run, recipe_path=recipe_path if base_only else None)
    checkpoints = [] if base_only else complete_checkpoints(run)
    if not base_only:
        for torn in torn_checkpoints(run):
            print(f"{torn}: not complete, left out")
        if not anyway:
            check_trained_as(run, recipe)
    checkpoints += [adapter_folder(folder) for folder in adapters or []]
    named_prompts = [(prompt_name(recipe.prompt), recipe.prompt)]
    named_prompts += [(file.stem, load_prompt(file)) for file in prompts or []]
    tokenizer, config, content = open_run(run, recipe)
    targets = eval_datasets(run, recipe, data, content)
    jobs = [
        Job(entry_key(content, target, checkpoint, prompt, shown), target, checkpoint, prompt, name, shown, ids)
        for target in targets
        for name, prompt in named_prompts
        for number in shots
        for shown, ids in [select_examples(recipe, target, prompt, number, examples)]
        for checkpoint in [None, *checkpoints]
    ]
    # Prompts that differ in worked examples alone are one job at zero shots; the recipe's comes first.
    by_key: dict[str, Job] = {}
    for job in jobs:
        by_key.setdefault(job.key, job)
    # The first process decides, and alone writes: another one may read files that it has begun to replace.
    missing = gather([key for key, job in by_key.items() if key not in job.target.results.rows])[0]
    pending = [by_key[key] for key in missing]
    if pending:
        print(f"{len(pending)} of {len(by_key)} entries to score")
        try:
            _score(run, recipe, tokenizer, config, pending, content["dequantized"])
        except KeyboardInterrupt:
            print("stopped: entries that were scored are kept; the same command goes on", flush=True)
            raise
    if rank() != 0:
        return 0
    for target in targets:
        target.results.choose_on(targets[0].results)
        target.results.write()
        print_results(target.results, against, recipe.evaluation)
        picture = target.results.folder / "learning_curve.png"
        changed = target.results.changed or targets[0].results.changed  # a dev file's scores are drawn too
        if target.results.entries and (changed or not picture.exists()):
            from hw3.evaluation.learning_curve import draw_curve

            draw_curve(target.results, run, picture)
        print(f"{portable(target.results.folder)}/: results.json, rows.parquet, learning_curve.png")
    return 0


def _score(
    run: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    pending: list[Job],
    dequantized: bool,
) -> None:
    """Score jobs, as many at once as there are processes, each kept as soon as it is done.

    Whole entries are shared out first: reading adapters is shared out with them, and figures are those of one process
    to the bit. Of the last ones, when there are fewer than processes, the rows are; batches then hold other rows
    together, which changes figures by rounding. A killed sweep loses the entries that were being scored or written, and
    those that waited for a slower process.
    """
    encoded: dict[tuple[Any, ...], list[EncodedRow]] = {}
    for job in pending:
        if job.text not in encoded:
            encoder = Encoder(tokenizer, job.prompt)
            encoded[job.text] = encode_rows(encoder, job.target.rows, job.examples, config, str(job.target.path))
    if rank() == 0 and not (run / RECIPE).exists():
        write_atomically(run / RECIPE, recipe.to_yaml())
    model = load_for_inference(recipe, dequantized=dequantized)
    check_head(model, min(encoded[pending[0].text], key=len))
    longest = max(len(row) for rows in encoded.values() for row in rows)
    budget = recipe.evaluation.tokens_per_batch or tokens_that_fit(model, longest)
    # By checkpoint, the base first: once an adapter is in, the base's layers are wrapped.
    groups: dict[Path | None, list[Job]] = {None: []}
    for job in pending:
        groups.setdefault(job.folder, []).append(job)
    jobs = [job for group in groups.values() for job in group]
    whole = len(jobs) - len(jobs) % world_size()  # the others are shared row by row
    own = [*jobs[rank() : whole : world_size()], *jobs[whole:]]
    folders = dict.fromkeys(job.folder for job in own if job.folder is not None)
    adapters = list(filter(holds_adapter, folders))
    left_out: set[Path | None] = set()

    def keep(at_once: list[Job], outcomes: list[Scored | BadAdapter]) -> None:
        if rank() != 0:
            return
        for job, outcome in zip(at_once, outcomes, strict=True):
            if not isinstance(outcome, BadAdapter):
                _keep(job, recipe, *outcome, count_unknown(encoded[job.text], tokenizer.unk_token_id))
            elif job.folder not in left_out:
                left_out.add(job.folder)
                tqdm.write(f"{outcome}; left out")

    kept: list[Future[None]] = []

    def check_kept() -> None:
        for one in filter(Future.done, kept):
            one.result()  # raises what went wrong

    # Exchanged and kept in a thread, so that no process waits for another one before the last entries.
    with closing(ReadAhead(adapters, pinned=model.device.type == "cuda")) as ahead, ThreadPoolExecutor(1) as keeping:
        scorer = Scorer(model, encoded, budget, ahead, check_kept)
        try:
            for at in range(0, whole, world_size()):
                at_once = jobs[at : at + world_size()]
                outcome = scorer.score(at_once[rank()])
                check_kept()
                kept.append(keeping.submit(lambda at_once, outcome: keep(at_once, gather(outcome)), at_once, outcome))
            for one in kept:
                one.result()
            for job in jobs[whole:]:
                keep([job], [merge_shards(gather(scorer.score(job, shared=True)))])
        except BaseException:
            # One that fails tells so at once; what waits for slower processes is scored again.
            keeping.shutdown(wait=False, cancel_futures=world_size() > 1)
            raise


def _keep(job: Job, recipe: Recipe, by_row: dict[int, RowScore], seconds: float, unknown: int) -> None:
    """Add an entry to its results, and say so."""
    scores = [by_row[at] for at in range(len(job.target.rows))]
    entry = _entry(job, recipe, scores, unknown, seconds)
    job.target.results.add(entry, scores)
    low, high = entry["mean_perplexity_ci95"]
    tqdm.write(  # beside the next entry's bar
        f"{job.title:<16}  {entry['shots']} shots  {job.prompt_name:<14}  {entry['mean_perplexity']:>9.3f}  "
        f"[{low:.2f}, {high:.2f}]  {job.target.path}  {seconds:.1f} s"
    )
    sys.stdout.flush()


def _entry(job: Job, recipe: Recipe, scores: list[RowScore], unknown: int, seconds: float) -> dict[str, Any]:
    figures = asdict(summarize(scores))
    interval = bootstrap_interval(
        [score.perplexity for score in scores],
        samples=recipe.evaluation.bootstrap_samples,
        seed=recipe.evaluation.bootstrap_seed,
    )
    instructions = {row.id: row.instruction for row in job.target.rows}
    return {
        "key": job.key,
        "step": 0 if job.checkpoint is None else job.checkpoint.step,
        "checkpoint": None if job.checkpoint is None else job.checkpoint.name,
        "shots": len(job.examples),
        "prompt": {"name": job.prompt_name, "sha256": job.prompt.sha256},
        "example_ids": job.example_ids,
        "adapter_sha256": None if job.checkpoint is None else job.checkpoint.sha256,
        "mean_perplexity": figures.pop("mean_perplexity"),
        "mean_perplexity_ci95": list(interval),
        **figures,
        "unknown_tokens": unknown,
        "by_direction": by_direction(scores, instructions),
        "by_length": by_length(scores),
        "heaviest": heaviest(scores),
        "seconds": round(seconds, 3),
    }
