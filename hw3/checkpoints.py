"""`hw3 eval`: which base, checkpoints, shots and prompts to score; one loaded base, adapters swapped, results kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from hw3.curve import draw_curve
from hw3.encoding import EncodedRow, Encoder, count_unknown
from hw3.errors import UserError
from hw3.model import (
    AdapterSlot,
    BadAdapter,
    base_sha256,
    dequantize_if_it_fits,
    device_of,
    load_base,
    load_config,
    load_tokenizer,
)
from hw3.perplexity import check_head, score_rows, summarize
from hw3.prompt import Example, Prompt
from hw3.recipe import Recipe, load_prompt, load_recipe
from hw3.results import Results
from hw3.rows import Row, file_sha256, read_rows, shorten
from hw3.run_folder import (
    RECIPE,
    TOKENIZER,
    Checkpoint,
    complete_checkpoints,
    portable,
    torn_checkpoints,
    write_atomically,
)
from hw3.statistics import bootstrap_interval

CPU_TOKENS_PER_BATCH = 1024  # activations stay in the cache; larger batches are slower
GPU_TOKENS_PER_BATCH = 8192  # larger ones are no faster
PROMPTS = Path("recipes/prompts")


@dataclass(frozen=True, slots=True)
class Job:
    """One entry to score: the base or a checkpoint, a prompt, a number of worked examples."""

    key: str
    checkpoint: Checkpoint | None
    prompt: Prompt
    prompt_name: str
    shots: int

    @property
    def title(self) -> str:
        """For progress and the table."""
        return "base" if self.checkpoint is None else self.checkpoint.path.name


def evaluate_run(
    run: Path,
    *,
    recipe_path: Path | None = None,
    data: Path | None = None,
    shots: list[int],
    prompts: list[Path],
    base_only: bool,
) -> int:
    """Score what has not been scored yet, print the table, write results and the learning curve.

    Args:
        run: the run folder.
        recipe_path: the recipe to make the folder from, where there is none.
        data: rows to score; the recipe's `data.eval` if None.
        shots: numbers of worked examples.
        prompts: further prompt files, scored beside the recipe's.
        base_only: leave the checkpoints out.

    Returns:
        0.

    Raises:
        UserError: there is no such run, or data, prompts or shots do not fit it.
    """
    recipe = _recipe_of(run, recipe_path)
    path = data or Path(recipe.data.eval)
    rows = read_rows(path)
    checkpoints = [] if base_only else complete_checkpoints(run)
    for torn in () if base_only else torn_checkpoints(run):
        print(f"{torn}: not complete, left out")
    named_prompts = [(_prompt_name(recipe.prompt), recipe.prompt)]
    named_prompts += [(file.stem, load_prompt(file)) for file in prompts]

    model_section = recipe.model
    tokenizer_folder = run / TOKENIZER
    tokenizer_section = (
        model_section.model_copy(update={"pretrained_model_name_or_path": str(tokenizer_folder), "revision": None})
        if tokenizer_folder.is_dir()
        else model_section
    )
    tokenizer = load_tokenizer(tokenizer_section)
    config = load_config(model_section)
    content = {
        "base": base_sha256(model_section, config),
        "data": file_sha256(path),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "dtype": model_section.dtype,
        "attn_implementation": model_section.attn_implementation,
        "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(),
    }
    head = {
        "schema": 1,
        "run": portable(run),
        "data": {"path": portable(path), "sha256": content["data"], "rows": len(rows)},
        "settings": {key: content[key] for key in ("dtype", "attn_implementation", "quantization")}
        | {"bootstrap_samples": recipe.evaluation.bootstrap_samples, "base_sha256": content["base"]},
    }
    results = Results.load(run / "eval" / path.stem, head, recipe.prompt.sha256)
    results.drop_replaced({checkpoint.path.name: checkpoint.sha256 for checkpoint in complete_checkpoints(run)})
    jobs = [
        Job(_key(content, checkpoint, prompt, examples), checkpoint, prompt, name, number)
        for name, prompt in named_prompts
        for number in shots
        for examples in [_examples(prompt, recipe.prompt, number)]
        for checkpoint in [None, *checkpoints]
    ]
    done = results.keys()
    pending = [job for job in jobs if job.key not in done]
    encoded = {
        (job.prompt.sha256, job.shots): encode_scored_rows(
            Encoder(tokenizer, job.prompt), rows, _examples(job.prompt, recipe.prompt, job.shots), config, path
        )
        for job in pending
    }
    if pending:
        print(f"{len(pending)} of {len(jobs)} entries to score on {len(rows)} rows of {path}")
        if not (run / RECIPE).exists():
            write_atomically(run / RECIPE, recipe.to_yaml())
        device = device_of(recipe)
        model = dequantize_if_it_fits(load_base(recipe, device).eval())
        check_head(model, min(next(iter(encoded.values())), key=len))
        budget = recipe.evaluation.tokens_per_batch or tokens_that_fit(
            model, max(len(row) for rows in encoded.values() for row in rows)
        )
        adapters = AdapterSlot(model)
        # The base comes first: once adapters are in, its layers are wrapped.
        for job in sorted(pending, key=lambda job: -1 if job.checkpoint is None else job.checkpoint.step):
            batch_rows = encoded[job.prompt.sha256, job.shots]
            try:
                scored = _model_for(job, recipe, model, adapters)
            except BadAdapter as error:
                print(f"{job.title}: {error}; left out")
                continue
            began = time.perf_counter()
            with tqdm(total=len(rows), desc=job.title, unit="row", disable=None, leave=False) as bar:
                scores = score_rows(scored, batch_rows, tokens_per_batch=budget, on_batch=bar.update)
            seconds = time.perf_counter() - began
            interval = bootstrap_interval(
                [score.perplexity for score in scores],
                samples=recipe.evaluation.bootstrap_samples,
                seed=recipe.evaluation.bootstrap_seed,
            )
            figures = asdict(summarize(scores))
            entry = {
                "key": job.key,
                "step": 0 if job.checkpoint is None else job.checkpoint.step,
                "checkpoint": None if job.checkpoint is None else job.checkpoint.path.name,
                "shots": job.shots,
                "prompt": {"name": job.prompt_name, "sha256": job.prompt.sha256},
                "adapter_sha256": None if job.checkpoint is None else job.checkpoint.sha256,
                "mean_perplexity": figures.pop("mean_perplexity"),
                "mean_perplexity_ci95": list(interval),
                **figures,
                "unknown_tokens": count_unknown(batch_rows, tokenizer.unk_token_id),
                "seconds": round(seconds, 3),
            }
            results.add(entry, scores)
            print(_line(entry), flush=True)
    _print_table(results)
    if results.entries:
        picture = results.folder / "learning_curve.png"
        if pending or not picture.exists():
            draw_curve(results, run, picture)
        print(f"{portable(results.folder)}/: results.json, rows.parquet, learning_curve.png")
    return 0


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


def encode_scored_rows(
    encoder: Encoder, rows: list[Row], examples: list[Example], config: Any, path: Path
) -> list[EncodedRow]:
    """Rows as ids, none cut and none dropped: `data.max_length` is about training.

    Raises:
        UserError: rows are longer than the positions that the model knows.
    """
    encoded = [encoder.encode(row, examples) for row in rows]
    most = config.get_text_config().max_position_embeddings
    problems = [
        f"{path}: row {number} (id {row.id}): {len(row)} tokens with {len(examples)} worked examples, "
        f"the model takes {most}"
        for number, row in enumerate(encoded, 1)
        if len(row) > most
    ]
    if problems:
        raise UserError(*shorten(problems))
    return encoded


def _recipe_of(run: Path, recipe_path: Path | None) -> Recipe:
    if (run / RECIPE).is_file():
        # Its name is of the folder it was written to; the run's own name matters nowhere here.
        return load_recipe(run / RECIPE)
    if recipe_path is None:
        raise UserError(f"{run}: no such run; train it first (make train, hw3 train RECIPE.yaml --run {run})")
    return load_recipe(recipe_path)


def _model_for(job: Job, recipe: Recipe, model: PreTrainedModel, adapters: AdapterSlot) -> PreTrainedModel:
    if job.checkpoint is None:
        return model
    if recipe.lora is not None:
        adapters.load(job.checkpoint.path)
        return model
    section = recipe.model.model_copy(
        update={"pretrained_model_name_or_path": str(job.checkpoint.path), "revision": None}
    )
    return dequantize_if_it_fits(load_base(dataclasses.replace(recipe, model=section), model.device).eval())


def _prompt_name(prompt: Prompt) -> str:
    """The file of `recipes/prompts/` with this content; `recipe` where there is none."""
    for file in sorted(PROMPTS.glob("*.yaml")):
        if load_prompt(file).sha256 == prompt.sha256:
            return file.stem
    return "recipe"


def _examples(prompt: Prompt, recipe_prompt: Prompt, shots: int) -> list[Example]:
    """The first worked examples of the prompt, or of the recipe's where it has none."""
    examples = prompt.examples or recipe_prompt.examples
    if shots < 0 or shots > len(examples):
        raise UserError(f"--shots {shots}: the prompt has {len(examples)} worked examples; give 0 to {len(examples)}")
    return examples[:shots]


def _key(content: dict[str, Any], checkpoint: Checkpoint | None, prompt: Prompt, examples: list[Example]) -> str:
    """An entry's identity: the content of everything that its figures depend on."""
    parts = content | {
        "adapter": None if checkpoint is None else checkpoint.sha256,
        "prompt": prompt.model_dump(exclude={"examples"}),
        "examples": [example.model_dump() for example in examples],
    }
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def _line(entry: dict[str, Any]) -> str:
    low, high = entry["mean_perplexity_ci95"]
    return (
        f"step {entry['step']:>5}  {entry['shots']} shots  {entry['prompt']['name']:<14}  "
        f"{entry['mean_perplexity']:>9.3f}  [{low:.2f}, {high:.2f}]  {entry['seconds']:.1f} s"
    )


def _print_table(results: Results) -> None:
    best = results.best()
    print(
        f"\n{'step':>6}  {'shots':>5}  {'prompt':<14}  {'mean ppl':>9}  {'95 % interval':>19}  {'token ppl':>9}  "
        f"{'median':>8}  {'bits/char':>9}"
    )
    for entry in results.entries:
        interval = "[{:.2f}, {:.2f}]".format(*entry["mean_perplexity_ci95"])
        is_best = best is not None and entry["checkpoint"] == best["checkpoint"] and entry["shots"] == 0
        mark = "  <- best" if is_best and entry["prompt"]["sha256"] == results.recipe_prompt else ""
        print(
            f"{entry['step']:>6}  {entry['shots']:>5}  {entry['prompt']['name']:<14}  "
            f"{entry['mean_perplexity']:>9.3f}  {interval:>19}  {entry['token_perplexity']:>9.3f}  "
            f"{entry['median_perplexity']:>8.3f}  {entry['bits_per_character']:>9.3f}{mark}"
        )
    if results.entries and (unknown := max(entry["unknown_tokens"] for entry in results.entries)):
        tokens = results.entries[0]["tokens"]
        print(f"{unknown} of {tokens} output tokens are unknown to the tokenizer ({unknown / tokens:.2%})")
    if best is not None:
        print(
            f"best: {best['checkpoint']}, mean perplexity {best['mean_perplexity']:.3f}, chosen on {best['chosen_on']}"
        )
