"""What answers: a run's base or one of its checkpoints under the run's prompt, found by name, loaded when needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hw3.common.errors import UserError
from hw3.config.recipe import Recipe
from hw3.data.prompt import Example
from hw3.data.rows import Row, read_rows
from hw3.data.templates import TEMPLATES
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.selection import choose_checkpoint
from hw3.generation.batch_generate import Answer, generate, generation_config, stop_ids
from hw3.generation.output_limits import AnswerLengths
from hw3.modeling.adapter_io import BadAdapter
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.logits import check_head
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.open_run import load_checkpoint, load_for_inference, open_run, prompt_content, recipe_of
from hw3.runs.resume import check_trained_as


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
