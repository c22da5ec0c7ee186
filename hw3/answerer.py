"""What answers: a run's base or one of its checkpoints under the run's prompt, found by name, loaded when needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hw3.corpus.templates import TEMPLATES
from hw3.encoding import EncodedRow, Encoder
from hw3.errors import UserError
from hw3.generation import Answer, AnswerLengths, generate, generation_config, stop_ids
from hw3.inference import load_checkpoint, load_for_inference, open_run, prompt_content, recipe_of
from hw3.model import AdapterSlot, BadAdapter
from hw3.perplexity import check_head
from hw3.prompt import Example
from hw3.recipe import Recipe
from hw3.results import RESULTS
from hw3.rows import Row, read_rows
from hw3.run_folder import Checkpoint, adapter_folder, check_trained_as, complete_checkpoints, portable


@dataclass(frozen=True)
class Answerer:
    """What answers: a run's base, one of its checkpoints or another adapter, a prompt; loaded when first needed.

    Attributes:
        run: the run folder.
        recipe: the run's, overrides applied.
        checkpoint: None for the base.
        chosen: one line on which it is and why.
        encoder: the run's tokenizer and prompt.
        config: the base's configuration.
        examples: worked examples in the prompt.
        content: what its answers depend on, by content.
    """

    run: Path
    recipe: Recipe
    checkpoint: Checkpoint | None
    chosen: str
    encoder: Encoder
    config: Any
    examples: list[Example]
    content: dict[str, Any]

    @classmethod
    def of(cls, run: Path, overrides: list[str] | None, checkpoint: str, shots: int, anyway: bool) -> Answerer:
        """Find it; nothing large is loaded.

        Raises:
            UserError: there is no such run or checkpoint, or the prompt has fewer worked examples.
        """
        foreign = [word for word in overrides or [] if not word.strip().startswith("generation.")]
        if foreign:
            raise UserError(f"{foreign[0]}: only generation.key=value may be set here; the rest is the run's own")
        recipe = recipe_of(run, overrides=overrides)
        chosen, why = choose_checkpoint(run, recipe, checkpoint)
        if chosen is not None and not anyway:
            check_trained_as(run, recipe)
        there = recipe.prompt.examples
        if not 0 <= shots <= len(there):
            raise UserError(
                f"--shots {shots}: the prompt has {len(there)} worked examples; give a number from 0 to that"
            )
        examples = there[:shots]
        tokenizer, config, content = open_run(run, recipe)
        content |= prompt_content(recipe.prompt, examples)
        content["adapter"] = None if chosen is None else chosen.sha256
        return cls(run, recipe, chosen, why, Encoder(tokenizer, recipe.prompt), config, examples, content)

    @property
    def name(self) -> str:
        """Of the file of answers: `base`, `base+4`, `checkpoint-100`; an adapter from elsewhere has its hash in it."""
        name = "base" if self.checkpoint is None else self.checkpoint.path.resolve().name
        if self.checkpoint is not None and self.checkpoint.path.resolve().parent != self.run.resolve():
            name += f"-{self.checkpoint.sha256[:8]}"
        return f"{name}+{len(self.examples)}" if self.examples else name

    @cached_property
    def lengths(self) -> AnswerLengths:
        """Limits from the training rows."""
        path = Path(self.recipe.data.train)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; the longest answers are estimated from the training rows. Without them give a "
                "limit: generation.max_new_tokens=512"
            )
        return AnswerLengths(read_rows(path), self.encoder)

    def limit(self, row: Row, encoded: EncodedRow) -> int:
        """Most new tokens of one answer; the prompt leaves room for one at least."""
        most = self.config.get_text_config().max_position_embeddings - len(encoded.prompt_ids)
        if most < 1:
            raise UserError(f"row {row.id}: its prompt fills the positions that the model knows; shorten it")
        return min(most, self.recipe.generation.max_new_tokens or self.lengths.limit(row.instruction))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base with the checkpoint's weights in it."""
        model = load_for_inference(self.recipe, dequantized=self.content["dequantized"])
        check_head(model, self.encoder.encode(Row("", TEMPLATES[0].text, None)))
        if self.checkpoint is not None:
            try:
                load_checkpoint(AdapterSlot(model), model, self.checkpoint)
            except BadAdapter as error:
                raise UserError(str(error)) from error
        return model

    @cached_property
    def generation(self) -> GenerationConfig:
        """How the model generates."""
        return generation_config(self.recipe.generation, stop_ids(self.model, self.encoder.eos_id))

    def answer(self, instruction: str) -> str:
        """The answer to one instruction."""
        row = Row("text", instruction, None)
        encoded = self.encoder.encode(row, self.examples)
        limit = self.limit(row, encoded)
        answers: list[Answer] = []
        config = self.generation  # before the model's own settings go
        generate(self.model, [encoded], limits=[limit], config=config, on_answer=lambda _, one: answers.append(one))
        return self.encoder.decode(answers[0].ids)


def choose_checkpoint(run: Path, recipe: Recipe, name: str) -> tuple[Checkpoint | None, str]:
    """The checkpoint that a name stands for, None for the base, and one line that says which and why.

    Raises:
        UserError: there is none; names those there are.
    """
    if name == "base":
        return None, "base, without an adapter"
    complete = {checkpoint.name: checkpoint for checkpoint in complete_checkpoints(run)}
    for path in (Path(name), run / name):
        if path.is_dir() and path.resolve().parent != run.resolve():
            other = adapter_folder(path)
            return other, other.name
    if name not in ("best", "last"):
        name = Path(name).name
        if name not in complete:
            there = ", ".join(complete) or "none yet"
            raise UserError(f"{run}: no complete checkpoint {name}; there are {there}; or best, last, base, or a path")
        return complete[name], name
    if not complete:
        raise UserError(f"{run}: no complete checkpoint yet; train on (hw3 train), or ask for base (--checkpoint base)")
    last = list(complete.values())[-1]
    if name == "last":
        return last, f"{last.name}, the last of {len(complete)}"
    best = best_of(run, recipe, complete)
    if best is None:
        return last, f"{last.name}, the last: none is scored yet (hw3 eval {portable(run)} finds the best)"
    score = f"mean perplexity {best['mean_perplexity']:.3f} on {best['chosen_on']}"
    return complete[best["checkpoint"]], f"{best['checkpoint']}, the best of those scored: {score}"


def best_of(run: Path, recipe: Recipe, complete: dict[str, Checkpoint]) -> dict[str, Any] | None:
    """`best` of the run's results: of the recipe's `data.eval`, or else of any other file.

    Args:
        run: the run folder.
        recipe: the run's.
        complete: the checkpoints there are, by name; one that is gone or was written anew is not the best.
    """
    found = []
    for file in sorted(run.glob(f"eval/*/{RESULTS}")):
        stored = json.loads(file.read_text(encoding="utf-8"))
        scored = {(entry["checkpoint"], entry["adapter_sha256"]) for entry in stored["entries"]}
        name = (stored["best"] or {}).get("checkpoint")
        if name in complete and (name, complete[name].sha256) in scored:
            found.append((stored["data"]["path"] != portable(Path(recipe.data.eval)), stored["best"]))
    return min(found, key=lambda pair: pair[0])[1] if found else None
