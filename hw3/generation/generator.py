"""Generate with the base model of a run, or with one of its checkpoints, under the run's prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hw3.common.errors import RunError, UserError
from hw3.config.recipe import Recipe, check_generation_overrides
from hw3.data.few_shot import check_shots
from hw3.data.input_limits import InputLimits
from hw3.data.prompt import Example
from hw3.data.rows import Row, read_rows
from hw3.data.templates import TEMPLATES
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.selection import select_checkpoint
from hw3.generation.batch_generate import Generation, build_generation_config, generate, get_stop_token_ids
from hw3.generation.output_limits import OutputLengthLimits
from hw3.modeling.adapter_io import InvalidAdapterError
from hw3.modeling.logits import verify_output_head
from hw3.runs.checkpoints import Checkpoint
from hw3.runs.identity import ModelIdentity
from hw3.runs.open_run import load_checkpoint, load_slot, open_run
from hw3.runs.resume import check_trained_as
from hw3.runs.run import Run


@dataclass(frozen=True)
class RunGenerator:
    """The base model of a run, or a checkpoint, with a prompt. The weights are loaded when they are first needed.

    Attributes:
        run: the run.
        recipe: the run's recipe, overrides applied.
        checkpoint: the checkpoint; None for the base model.
        selection: one line that reports which checkpoint was selected, and why.
        encoder: the run's tokenizer and prompt.
        input_limits: what the base model takes as input.
        examples: few-shot examples in the prompt.
        identity: what every prediction depends on, besides checkpoint and prompt.
    """

    run: Run
    recipe: Recipe
    checkpoint: Checkpoint | None
    selection: str
    encoder: Encoder
    input_limits: InputLimits
    examples: list[Example]
    identity: ModelIdentity

    @classmethod
    def open(
        cls,
        run: Run,
        checkpoint: str = "best",
        *,
        shots: int = 0,
        overrides: list[str] | None = None,
        allow_mismatch: bool = False,
    ) -> RunGenerator:
        """Open a run for generation; no weights are loaded.

        Args:
            run: the run.
            checkpoint: `best`, `last`, `base`, a checkpoint's name, or the path of a checkpoint or of any PEFT adapter.
            shots: number of few-shot examples in the prompt.
            overrides: `generation.key=value` assignments.
            allow_mismatch: use checkpoints that were trained with another prompt, base model or quantization.

        Raises:
            UserError: there is no such run or checkpoint, the prompt has fewer few-shot examples, or an override is
                not of the `generation` section.
        """
        check_generation_overrides(overrides or [])
        recipe = run.load_recipe(overrides)
        selected, selection = select_checkpoint(run, recipe, checkpoint)
        if selected is not None and not allow_mismatch:
            check_trained_as(run, recipe)
        check_shots(recipe.prompt, shots)
        opened = open_run(run, recipe)
        return cls(
            run=run,
            recipe=recipe,
            checkpoint=selected,
            selection=selection,
            encoder=Encoder(opened.tokenizer, recipe.prompt),
            input_limits=opened.input_limits,
            examples=recipe.prompt.examples[:shots],
            identity=opened.identity,
        )

    @property
    def name(self) -> str:
        """File name of the predictions: `base`, `base+4` with four few-shot examples, `checkpoint-100`.

        The name of an adapter from elsewhere ends in a part of its hash.
        """
        name = "base"
        if self.checkpoint is not None:
            folder = self.checkpoint.path.resolve()
            name = folder.name
            if folder.parent != self.run.path.resolve():
                name += f"-{self.checkpoint.sha256[:8]}"
        return f"{name}+{len(self.examples)}" if self.examples else name

    def key(self, **more: Any) -> str:
        """Return a key that identifies predictions by everything that they depend on.

        Args:
            more: JSON values of what they depend on besides model, checkpoint and prompt.
        """
        adapter_sha256 = None if self.checkpoint is None else self.checkpoint.sha256
        return self.identity.key(adapter_sha256, self.recipe.prompt, self.examples, **more)

    @cached_property
    def length_limits(self) -> OutputLengthLimits:
        """Limits of output lengths, from the training rows.

        Raises:
            UserError: the training file is missing.
        """
        path = Path(self.recipe.data.train)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; the limit of new tokens is estimated from the training rows. Restore the file, "
                "or give a limit: generation.max_new_tokens=512"
            )
        return OutputLengthLimits(read_rows(path), self.encoder)

    def get_max_new_tokens(self, row: Row, encoded: EncodedRow) -> int:
        """Return the limit of new tokens for a row, EOS included.

        Args:
            row: the row.
            encoded: the row's token ids.

        Raises:
            UserError: the prompt leaves no position for a new token.
        """
        free_positions = self.input_limits.max_positions - len(encoded.prompt_ids)
        if free_positions < 1:
            raise UserError(
                f"row {row.id}: its prompt has {len(encoded.prompt_ids)} tokens, and the model takes "
                f"{self.input_limits.max_positions} with the output; shorten the prompt"
            )
        limit = self.recipe.generation.max_new_tokens or self.length_limits.get_max_new_tokens(row.instruction)
        return min(free_positions, limit)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base model with the weights of the checkpoint, in evaluation mode.

        Raises:
            UserError: the base model is not available.
            RunError: the checkpoint cannot be used with it.
        """
        slot = load_slot(self.recipe, dequantized=self.identity.dequantized)
        verify_output_head(slot.model, self.encoder.encode(Row("", TEMPLATES[0].text, None)))
        if self.checkpoint is not None:
            try:
                load_checkpoint(slot, self.checkpoint)
            except InvalidAdapterError as error:
                raise RunError(str(error)) from error
        return slot.model

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The recipe's `generation` section with the stop ids.

        Access it before the first call of `generate`, which replaces the model's own generation config.
        """
        stop_token_ids = get_stop_token_ids(self.model, self.encoder.eos_token_id)
        return build_generation_config(self.recipe.generation, stop_token_ids)

    def generate_text(self, instruction: str) -> str:
        """Return the output for one instruction.

        Raises:
            UserError: the instruction is too long for the model, or has a token without an embedding.
        """
        row = Row("text", instruction, None)
        encoded = self.encoder.encode(row, self.examples)
        max_new_tokens = self.get_max_new_tokens(row, encoded)
        if problems := self.input_limits.find_row_problems(self.encoder.tokenizer, [encoded], "the instruction"):
            raise UserError(*problems)
        generations: list[Generation] = []
        generate(
            self.model,
            [encoded],
            max_new_tokens=[max_new_tokens],
            generation_config=self.generation_config,
            on_generation=lambda _, generation: generations.append(generation),
        )
        return self.encoder.decode(generations[0].token_ids)
