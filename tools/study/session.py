"""Train and score runs of one base model in one process, with one captured step and one copy of the base for scoring.

Every run is built by `hw3 train`'s own functions, so its adapter is that of `hw3 train` with the same recipe. Scores
are those of `hw3 eval`. Checkpoints stay in memory.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from hw3.config.recipe import Recipe, load_prompt
from hw3.data.few_shot import prompt_examples, sample_examples
from hw3.data.prompt import Example, Prompt
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.bootstrap import bootstrap_interval
from hw3.evaluation.breakdown import scores_by_direction
from hw3.evaluation.perplexity import RowScore, score_rows, summarize
from hw3.evaluation.translation_metrics import compute_metrics, metrics_of_copying
from hw3.generation.batch_generate import Generation, build_generation_config, generate, get_stop_token_ids
from hw3.generation.output_limits import OutputLengthLimits
from hw3.modeling.adapter_io import AdapterFiles
from hw3.modeling.devices import select_device
from hw3.modeling.loading import count_base_parameters
from hw3.modeling.quantization import should_dequantize
from hw3.runs.open_run import load_slot
from hw3.training.plan import Plan, plan_run
from hw3.training.session import TrainingSession
from hw3.training.train import build_trainer
from hw3.training.trainer import CompletionTrainer
from study.plan import StudyRun

EVAL_LOSS_ROWS = 8  # rows of a batch of the Trainer's evaluation loss; `per_device_eval_batch_size` is 8
GENERATION_BYTES = 4 * 2**30  # of a batch; several processes share the GPU
EXAMPLES_SEEDS = (0, 1, 2)
SAMPLE_FILE = "data/eval.json"  # the project's own rows, of which documents may quote predictions
FEW_SHOT = {"prompt": (1, 2, 4), "train": (1, 2, 4, 8)}  # few-shot examples, by where they come from

Record = dict[str, Any]


class Session:
    """A base model, with the step that was captured for the first run.

    Args:
        first: a run; all further ones must have the same `StudyRun.group`.
        data: the folder of `write_data`.
        on_gpu: whether to use a GPU.
        extra: overrides of all recipes.
    """

    def __init__(self, first: StudyRun, data: Path, *, on_gpu: bool, extra: Sequence[str] = ()) -> None:
        self._data, self._on_gpu, self._extra = data, on_gpu, extra
        self._scratch = tempfile.TemporaryDirectory()
        self._shared = TrainingSession()
        all_rows = {key: value for key, value in first.settings.items() if key != "train_share"}
        self._recipe = recipe = self._load_recipe(replace(first, settings=all_rows))
        plan = self._plan_run(recipe)
        self._tokenizer, self._bucket_lengths = plan.tokenizer, plan.strategy.bucket_lengths
        num_parameters = count_base_parameters(plan.workload.config)
        self._dequantized = should_dequantize(recipe, num_parameters, select_device(recipe))
        self._slot = load_slot(recipe, dequantized=self._dequantized)
        assert recipe.data.dev is not None, "`StudyRun.load_recipe` sets it"
        paths = {"held_out": recipe.data.dev, "eval": recipe.data.eval, "sample": SAMPLE_FILE}
        self._rows = {name: read_rows(Path(path)) for name, path in paths.items()}
        self._encoded: dict[tuple[str, str, tuple[Example, ...]], list[EncodedRow]] = {}

    def _load_recipe(self, run: StudyRun) -> Recipe:
        return run.load_recipe(self._data, on_gpu=self._on_gpu, extra=self._extra)

    def _plan_run(self, recipe: Recipe) -> Plan:
        return plan_run(recipe, Path(self._scratch.name) / "run", processes=1, cache=self._shared.cache)

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, run: StudyRun) -> tuple[Record, dict[str, list[list[float]]]]:
        """Train a run, and score each of its checkpoints and what its experiments ask for.

        Returns:
            The run's record, and row perplexities by data file and checkpoint.
        """
        started = time.perf_counter()
        recipe = self._load_recipe(run)
        trainer = self._build_trainer(recipe)
        scorer = _CheckpointScorer(self, recipe, recipe.training["save_steps"], "metrics" in run.scores)
        trainer.add_callback(scorer)
        ready = time.perf_counter()
        trainer.train()
        best = min(scorer.curve, key=lambda point: point["held_out"]["mean_perplexity"])
        adapter = scorer.adapters[best["step"]]
        trained = time.perf_counter()
        record: Record = {
            "id": run.id,
            "model": run.model.name,
            "experiments": run.experiments,
            "settings": run.settings,
            "seed": run.seed,
            "steps": trainer.state.max_steps,
            "rows_per_step": recipe.rows_per_step,
            "training_rows": len(trainer.train_dataset),
            "device": torch.cuda.get_device_name() if self._on_gpu else "CPU",
            "cuda_graphs": trainer.cuda_graph_step is not None,
            "best_step": best["step"],
            "curve": scorer.curve,
            "losses": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
            **self._score_more(run, recipe, adapter),
        }
        record["seconds"] = {
            "start": round(ready - started, 2),
            "train": round(trained - ready - scorer.seconds, 2),
            "score": round(scorer.seconds, 2),
            "more": round(time.perf_counter() - trained, 2),
        }
        del trainer
        self._shared.restore()
        return record, scorer.row_perplexities

    def _build_trainer(self, recipe: Recipe) -> CompletionTrainer:
        """Build the trainer of `hw3 train`, which saves no checkpoints here."""
        plan = self._plan_run(recipe)
        # A share of the rows may lack some lengths. With those of all rows, the captured step is the same.
        strategy = replace(plan.strategy, bucket_lengths=self._bucket_lengths)
        plan = replace(plan, strategy=strategy)
        plan.config.save_strategy = SaveStrategy.NO
        base = self._shared.take_base(plan)
        trainer = build_trainer(recipe, plan.config, strategy, base, plan.tokenizer, plan.rows)
        if strategy.cuda_graphs:
            if failure := trainer.capture(self._shared.captured_step):
                raise RuntimeError(f"the CUDA-graph step {failure}")
            self._shared.keep_step(plan, trainer.verified_step)
        return trainer

    # --- scoring ------------------------------------------------------------------------------------------------------

    def install(self, adapter: AdapterFiles | None) -> None:
        """Put an adapter into the base model for scoring; None loads the base model without one."""
        if adapter is None:
            self._slot = load_slot(self._recipe, dequantized=self._dequantized)
        else:
            self._slot.set(adapter)

    def score(
        self, recipe: Recipe, file: str, prompt: Prompt | None = None, examples: Sequence[Example] = ()
    ) -> tuple[Record, list[float]]:
        """Score the installed model on a data file; return its scores, and the rows' perplexities."""
        prompt, rows = prompt or recipe.prompt, self._rows[file]
        key = (file, prompt.sha256, tuple(examples))
        if key not in self._encoded:
            encoder = Encoder(self._tokenizer, prompt)
            self._encoded[key] = [encoder.encode(row, list(examples)) for row in rows]
        tokens_per_batch = recipe.evaluation.tokens_per_batch
        assert tokens_per_batch is not None, "`StudyRun.load_recipe` sets it"
        scores = score_rows(self._slot.model, self._encoded[key], tokens_per_batch=tokens_per_batch)
        return _summarize(scores, rows, recipe), [score.perplexity for score in scores]

    def predict(self, recipe: Recipe, file: str) -> Record:
        """Predict the outputs of a data file with the installed model; return them with their metrics."""
        rows, encoder = self._rows[file], Encoder(self._tokenizer, recipe.prompt)
        limits = OutputLengthLimits(read_rows(Path(recipe.data.train)), encoder)
        model = self._slot.model
        stop_token_ids = get_stop_token_ids(model, encoder.eos_token_id)
        outputs: dict[str, str] = {}
        unfinished = set()

        def keep(index: int, generation: Generation) -> None:
            outputs[rows[index].id] = encoder.decode(generation.token_ids)
            if not generation.finished:
                unfinished.add(rows[index].id)

        generate(
            model,
            [encoder.encode(row) for row in rows],
            max_new_tokens=[limits.get_max_new_tokens(row.instruction) for row in rows],
            generation_config=build_generation_config(recipe.generation, stop_token_ids),
            on_generation=keep,
            batch_bytes=GENERATION_BYTES if self._on_gpu else None,
        )
        metrics = compute_metrics(rows, outputs, frozenset(unfinished))
        return {"outputs": outputs, "metrics": {name: asdict(group) for name, group in metrics.items()}}

    def _score_more(self, run: StudyRun, recipe: Recipe, adapter: AdapterFiles) -> Record:
        """Score the best checkpoint, and the base model, with other prompts and few-shot examples, and predict."""
        more: Record = {"entries": {}, "predictions": {}}
        models: dict[str, AdapterFiles | None] = {"best": adapter}
        if "base" in run.scores:
            models["base"] = None
        for name, installed in models.items():
            if run.scores & {"few_shot", "prompts", "predictions"}:
                self.install(installed)
            entries = self._score_few_shot(run, recipe) if "few_shot" in run.scores else []
            entries += self._score_prompts(run, recipe) if "prompts" in run.scores else []
            more["entries"][name] = entries
            if "predictions" in run.scores:
                more["predictions"][name] = self.predict(recipe, "sample")
                is_sample = recipe.data.eval == SAMPLE_FILE
                predicted = more["predictions"][name] if is_sample else self.predict(recipe, "eval")
                more["predictions"][name]["eval_metrics"] = predicted["metrics"]
        if "predictions" in run.scores:
            for file in ("sample", "eval"):
                copying = metrics_of_copying(self._rows[file])
                more["predictions"][f"copying {file}"] = {name: asdict(group) for name, group in copying.items()}
        return more

    def _score_few_shot(self, run: StudyRun, recipe: Recipe) -> list[Record]:
        entries = [{"shots": 0, "examples": "prompt", **self.score(recipe, "eval")[0]}]
        for shots in FEW_SHOT["prompt"]:
            examples, _ = prompt_examples(recipe.prompt, recipe.prompt, shots)
            entries.append({"shots": shots, "examples": "prompt", **self.score(recipe, "eval", None, examples)[0]})
        training = read_rows(Path(self._load_recipe(replace(run, settings={})).data.train))
        for seed in EXAMPLES_SEEDS:
            for shots in FEW_SHOT["train"]:
                examples, ids = sample_examples(training, self._rows["eval"], shots, seed)
                scores = self.score(recipe, "eval", None, examples)[0]
                entries.append({"shots": shots, "examples": "train", "seed": seed, "ids": ids, **scores})
        return entries

    def _score_prompts(self, run: StudyRun, recipe: Recipe) -> list[Record]:
        entries = []
        for name in run.model.prompts:
            prompt = load_prompt(Path(f"recipes/prompts/{name}.yaml"))
            entries.append({"prompt": name, **self.score(recipe, "eval", prompt)[0]})
        return entries


class _CheckpointScorer(TrainerCallback):
    """Score the adapter every few steps, as `hw3 eval` scores the checkpoints that `hw3 train` would save.

    Args:
        session: the session.
        recipe: the run's recipe.
        save_steps: steps between two checkpoints.
        with_metrics: whether to predict, and compute BLEU and chrF.

    Attributes:
        curve: scores by checkpoint.
        adapters: the adapters by step, on the CPU.
        row_perplexities: by data file, then by checkpoint.
        seconds: time that scoring took.
    """

    def __init__(self, session: Session, recipe: Recipe, save_steps: int, with_metrics: bool) -> None:
        self._session, self._recipe = session, recipe
        self._save_steps, self._with_metrics = save_steps, with_metrics
        self.curve: list[Record] = []
        self.adapters: dict[int, AdapterFiles] = {}
        self.row_perplexities: dict[str, list[list[float]]] = {"held_out": [], "eval": []}
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score, if this step ends a checkpoint."""
        model: PeftModel = kwargs["model"]
        if state.global_step % self._save_steps and state.global_step != state.max_steps:
            return
        started = time.perf_counter()
        weights = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
        config = copy.deepcopy(model.peft_config["default"])
        adapter = AdapterFiles(Path(f"step-{state.global_step}"), "", config, weights)
        self.adapters[state.global_step] = adapter
        self._session.install(adapter)
        point: Record = {"step": state.global_step}
        for file, perplexities in self.row_perplexities.items():
            point[file], rows = self._session.score(self._recipe, file)
            perplexities.append(rows)
        if self._with_metrics:
            metrics = self._session.predict(self._recipe, "eval")["metrics"]
            point["metrics"] = {name: {key: group[key] for key in ("bleu", "chrf")} for name, group in metrics.items()}
        self.curve.append(point)
        self.seconds += time.perf_counter() - started


def _summarize(scores: Sequence[RowScore], rows: Sequence[Row], recipe: Recipe) -> Record:
    """Return the scores of a model on a file, with the names of `ScoreEntry`, and the Trainer's evaluation loss."""
    evaluation, summary = recipe.evaluation, asdict(summarize(scores))
    batches = [scores[first : first + EVAL_LOSS_ROWS] for first in range(0, len(scores), EVAL_LOSS_ROWS)]
    losses = [sum(score.nll for score in batch) / sum(score.tokens for score in batch) for batch in batches]
    weighted = sum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True))
    interval = bootstrap_interval(
        [score.perplexity for score in scores],
        samples=evaluation.bootstrap_samples,
        seed=evaluation.bootstrap_seed,
    )
    directions = scores_by_direction(scores, {row.id: row.instruction for row in rows})
    return {
        **{key: round(summary[key], 5) for key in ("mean_perplexity", "token_perplexity", "bits_per_character")},
        "ci95": [round(bound, 4) for bound in interval],
        "eval_loss": round(weighted / len(scores), 6),
        "by_direction": {name: round(group.mean_perplexity, 4) for name, group in directions.items()},
    }
