"""`hw3 eval`: which base, checkpoints, shots and prompts to score; one loaded base, adapters swapped, results kept."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hw3.adapter_files import BadAdapter, ReadAhead
from hw3.encoding import EncodedRow, Encoder, count_unknown
from hw3.errors import UserError
from hw3.examples import drawn_examples, listed_examples
from hw3.files import write_atomically
from hw3.inference import (
    content_key,
    encode_rows,
    holds_adapter,
    load_checkpoint,
    load_for_inference,
    open_run,
    prompt_content,
    prompt_name,
    recipe_of,
)
from hw3.model import AdapterSlot
from hw3.perplexity import RowScore, check_head, score_rows, summarize
from hw3.processes import gather, own_share, rank, world_size
from hw3.prompt import Example, Prompt
from hw3.recipe import Recipe, load_prompt
from hw3.results import RESULTS, Results, print_results
from hw3.rows import Row, read_rows
from hw3.run_folder import (
    RECIPE,
    Checkpoint,
    adapter_folder,
    check_trained_as,
    complete_checkpoints,
    data_facts,
    is_other_file,
    portable,
    read_manifest,
    torn_checkpoints,
)
from hw3.statistics import bootstrap_interval, by_direction, by_length, heaviest

CPU_TOKENS_PER_BATCH = 1024  # activations stay in the cache; larger batches are slower
GPU_TOKENS_PER_BATCH = 4096  # larger ones are no faster


Scored = tuple[dict[int, RowScore], float]  # scores by the row's number, and seconds


@dataclass(frozen=True)
class Target:
    """A data file to score, and what has been scored on it."""

    path: Path
    rows: list[Row]
    results: Results


@dataclass(frozen=True, slots=True)
class Job:
    """One entry to score: the base or a checkpoint, a prompt and its worked examples, a data file."""

    key: str
    target: Target
    checkpoint: Checkpoint | None
    prompt: Prompt
    prompt_name: str
    examples: list[Example]
    example_ids: list[str] | None

    @property
    def text(self) -> tuple[Any, ...]:
        """What the encoded rows depend on; every checkpoint of a sweep shares them."""
        return self.target.path, self.prompt.sha256, tuple(self.examples)

    @property
    def folder(self) -> Path | None:
        """Of the checkpoint; None for the base."""
        return self.checkpoint and self.checkpoint.path

    @property
    def title(self) -> str:
        """For progress and messages."""
        return "base" if self.checkpoint is None else self.checkpoint.path.name


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
    targets = _targets(run, recipe, data, content)
    jobs = [
        Job(_key(content, target, checkpoint, prompt, shown), target, checkpoint, prompt, name, shown, ids)
        for target in targets
        for name, prompt in named_prompts
        for number in shots
        for shown, ids in [_examples(recipe, target, prompt, number, examples)]
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
            from hw3.curve import draw_curve  # Matplotlib takes a second to import

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
        scorer = _Scorer(model, encoded, budget, ahead, check_kept)
        try:
            for at in range(0, whole, world_size()):
                at_once = jobs[at : at + world_size()]
                outcome = scorer.score(at_once[rank()])
                check_kept()
                kept.append(keeping.submit(lambda at_once, outcome: keep(at_once, gather(outcome)), at_once, outcome))
            for one in kept:
                one.result()
            for job in jobs[whole:]:
                keep([job], [_joined_up(gather(scorer.score(job, shared=True)))])
        except BaseException:
            # One that fails tells so at once; what waits for slower processes is scored again.
            keeping.shutdown(wait=False, cancel_futures=world_size() > 1)
            raise


class _Scorer:
    """The loaded base, and the checkpoint that is in it.

    Args:
        model: the base.
        encoded: rows by a job's text.
        budget: most tokens of a padded batch.
        ahead: the adapters of the jobs that this process will score, in their order.
        check: called after each batch; may raise.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoded: dict[tuple[Any, ...], list[EncodedRow]],
        budget: int,
        ahead: ReadAhead,
        check: Callable[[], None],
    ) -> None:
        self._model, self._encoded, self._budget, self._ahead, self._check = model, encoded, budget, ahead, check
        self._slot = AdapterSlot(model)
        self._held: Path | None = None
        self._bad: dict[Path, BadAdapter] = {}

    def score(self, job: Job, *, shared: bool = False) -> Scored | BadAdapter | UserError:
        """One job, or this process's share of its rows; or what is wrong with its checkpoint or its figures."""
        rows = self._encoded[job.text]
        own = own_share([len(row) for row in rows]) if shared else range(len(rows))
        try:
            if job.checkpoint is not None:
                self._hold(job.checkpoint)
            began = time.perf_counter()
            hidden = True if rank() else None  # on the first process's terminal alone
            with tqdm(total=len(own), desc=job.title, unit="row", disable=hidden, leave=False) as bar:

                def progressed(count: int) -> None:
                    bar.update(count)
                    self._check()

                taken = [rows[at] for at in own]
                scores = (
                    score_rows(self._model, taken, tokens_per_batch=self._budget, on_batch=progressed) if own else []
                )
        except (BadAdapter, UserError) as error:
            return error
        return dict(zip(own, scores, strict=True)), time.perf_counter() - began

    def _hold(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint's weights in the base; a bad one's jobs all end with what was wrong with it at first."""
        folder = checkpoint.path
        if folder in self._bad:
            raise self._bad[folder]
        if folder == self._held:
            return
        self._held = None
        try:
            adapter = self._ahead.take(folder) if folder in self._ahead.folders else None
            load_checkpoint(self._slot, self._model, checkpoint, adapter)
        except BadAdapter as error:
            self._bad[folder] = error
            raise
        self._held = folder


def _joined_up(shares: list[Scored | BadAdapter]) -> Scored | BadAdapter:
    """All rows of an entry, and the longest time that a process took."""
    bad = next((share for share in shares if isinstance(share, BadAdapter)), None)
    if bad is not None:
        return bad
    return {at: score for scores, _ in shares for at, score in scores.items()}, max(seconds for _, seconds in shares)


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


def tokens_that_fit(model: PreTrainedModel, longest: int) -> int:
    """Padded tokens of a batch, from free memory: what a layer's activations take, with half of memory to spare.

    Args:
        model: the loaded model.
        longest: tokens of the longest row, common prefix included.
    """
    if model.device.type == "cpu":
        return CPU_TOKENS_PER_BATCH
    config = model.config.get_text_config()
    # MLP and residuals in the compute dtype, the adapters' float32 copies, attention scores with a float32 softmax.
    bytes_per_token = (model.dtype.itemsize + 4) * (4 * config.intermediate_size + 8 * config.hidden_size)
    bytes_per_token += config.num_attention_heads * longest * (2 * model.dtype.itemsize + 4)
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(longest, min(GPU_TOKENS_PER_BATCH, free // 2 // bytes_per_token))


def _targets(run: Path, recipe: Recipe, data: Path | None, content: dict[str, Any]) -> list[Target]:
    """The files to score. The first one chooses the best checkpoint: the dev file where the recipe has one."""
    names = [data] if data is not None else [name for name in (recipe.data.dev, recipe.data.eval) if name is not None]
    settings = {key: content[key] for key in ("dtype", "attn_implementation", "quantization", "dequantized")}
    settings |= {"base_sha256": content["base"], "tokenizer_sha256": content["tokenizer"]}
    settings |= {key: getattr(recipe.evaluation, key) for key in ("bootstrap_samples", "bootstrap_seed")}
    present = {checkpoint.name: checkpoint.sha256 for checkpoint in complete_checkpoints(run)}
    started = read_manifest(run).get("started")
    targets = []
    for path in map(Path, names):
        rows = read_rows(path)
        head = {
            "schema": 1,
            "run": portable(run),
            "started": started,
            "data": data_facts(path, rows),
            "settings": settings,
        }
        results = Results.load(_results_folder(run, path, head["data"]), head, recipe.prompt.sha256)
        results.drop_replaced(present)
        targets.append(Target(path, rows, results))
    return targets


def _results_folder(run: Path, path: Path, data: dict[str, Any]) -> Path:
    """`eval/<stem>`; with a part of the hash where that is another file's of the same name."""
    folder = run / "eval" / path.stem
    try:
        stored = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        return folder
    return folder.with_name(f"{folder.name}-{data['sha256'][:8]}") if is_other_file(stored, data, path) else folder


def _examples(
    recipe: Recipe, target: Target, prompt: Prompt, shots: int, source: str
) -> tuple[list[Example], list[str] | None]:
    if source == "train" and shots:
        training = read_rows(Path(recipe.data.train))
        return drawn_examples(training, target.rows, shots, recipe.evaluation.examples_seed)
    return listed_examples(prompt, recipe.prompt, shots)


def _key(
    content: dict[str, Any], target: Target, checkpoint: Checkpoint | None, prompt: Prompt, examples: list[Example]
) -> str:
    """An entry's identity: the content of everything that its figures depend on."""
    return content_key(
        content
        | {
            "data": target.results.head["data"]["sha256"],
            "adapter": None if checkpoint is None else checkpoint.sha256,
        }
        | prompt_content(prompt, examples)
    )
