"""`eval/<file stem>/results.json`: the scores of a run on one data file, and which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from hw3.config.schema import BestBy
from hw3.data.fingerprint import DatasetFingerprint
from hw3.runs.file_model import FileModel


class PromptReference(FileModel):
    """A prompt: the name of its file, and a hash of its content."""

    name: str
    sha256: str


class GroupScore(FileModel):
    """Scores of a group of rows."""

    mean_perplexity: float
    token_perplexity: float
    rows: int
    tokens: int


class RowContribution(FileModel):
    """A row that contributes much to the mean perplexity.

    Attributes:
        id: the row's id.
        perplexity: the row's perplexity.
        share: its perplexity divided by the sum over all rows.
        tokens: output tokens, EOS included.
    """

    id: str
    perplexity: float
    share: float
    tokens: int


class ScoreEntry(FileModel):
    """Scores of the base model or of one checkpoint, under one prompt, on one data file.

    Attributes:
        key: hash of everything that the scores depend on.
        step: optimizer steps; 0 for the base model and for adapters from elsewhere.
        checkpoint: folder name of a checkpoint of the run, path of another adapter, None for the base model.
        shots: number of few-shot examples.
        prompt: the prompt.
        example_ids: ids of few-shot examples that were drawn from the training file; None for the prompt's own.
        adapter_sha256: hash of the checkpoint's weights; None for the base model.
        mean_perplexity: the course's score: mean over rows of exp(negative log-likelihood per output token).
        mean_perplexity_ci95: 95 % bootstrap interval of `mean_perplexity`.
        token_perplexity: exp(total negative log-likelihood / total output tokens).
        median_perplexity: median over rows.
        bits_per_character: total bits, EOS included, per output character.
        rows: number of rows.
        tokens: output tokens, EOS included.
        unknown_tokens: output tokens that the tokenizer does not know.
        prompt_tokens: tokens of all rows' prompts: BOS, few-shot examples and instruction. Older files do not have it.
        by_direction: scores by translation direction: `m2c`, `c2m`, `other`.
        by_length: scores by number of output characters.
        top_contributors: the rows with the highest perplexities, highest first.
        seconds: time to score the rows.
    """

    key: str
    step: int
    checkpoint: str | None
    shots: int
    prompt: PromptReference
    example_ids: list[str] | None
    adapter_sha256: str | None
    mean_perplexity: float
    mean_perplexity_ci95: tuple[float, float]
    token_perplexity: float
    median_perplexity: float
    bits_per_character: float
    rows: int
    tokens: int
    unknown_tokens: int
    prompt_tokens: int | None = Field(default=None, exclude_if=lambda tokens: tokens is None)
    by_direction: dict[str, GroupScore]
    by_length: dict[str, GroupScore]
    top_contributors: list[RowContribution]
    seconds: float

    @property
    def is_base(self) -> bool:
        """Whether the base model was scored, without an adapter."""
        return self.checkpoint is None

    @property
    def is_run_checkpoint(self) -> bool:
        """Whether a checkpoint of the run was scored, not the base model or an adapter from elsewhere."""
        return self.step > 0

    @property
    def label(self) -> str:
        """Name for tables: `base`, `base+4` with four few-shot examples, `checkpoint-100`."""
        name = self.checkpoint or "base"
        return f"{name}+{self.shots}" if self.shots else name

    @property
    def prompt_label(self) -> str:
        """Name for rankings of prompts: `study`, `study+4` with four few-shot examples."""
        return f"{self.prompt.name}+{self.shots}" if self.shots else self.prompt.name


class BestCheckpoint(FileModel):
    """The checkpoint with the lowest perplexity on `chosen_on`.

    Attributes:
        step: its optimizer steps.
        checkpoint: its folder name.
        mean_perplexity: its score on this data file, which may not be `chosen_on`.
        chosen_on: path of the data file whose scores selected it: the dev file, if the recipe has one.
        chosen_by: the figure that is lowest.
    """

    step: int
    checkpoint: str
    mean_perplexity: float
    chosen_on: str
    chosen_by: BestBy = "mean_perplexity"

    @property
    def criterion(self) -> str:
        """Name of the figure that is lowest, for messages."""
        return self.chosen_by.replace("_", " ")


class ScoringSettings(FileModel):
    """How a file's rows were scored. Entries with other settings are not comparable and are scored again.

    The version is that of `hw3.runs.identity`; files of version 1 do not have it.
    """

    dtype: str
    attn_implementation: str | None
    quantization: dict[str, Any] | None
    dequantized: bool
    base_sha256: str
    tokenizer_sha256: str
    bootstrap_samples: int
    bootstrap_seed: int
    scoring_version: int = 1


class ResultsFile(FileModel):
    """The scores of a run on one data file.

    Attributes:
        run: path of the run folder.
        started: when the run began, from its manifest; None before training.
        data: the data file.
        settings: how its rows were scored.
        entries: the scores.
        best: the best checkpoint; None where none has been scored.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    run: str
    started: str | None
    data: DatasetFingerprint
    settings: ScoringSettings
    entries: list[ScoreEntry]
    best: BestCheckpoint | None


def finetuned_entries(entries: Iterable[ScoreEntry], prompt_sha256: str) -> list[ScoreEntry]:
    """Return the zero-shot entries of the run's checkpoints under one prompt, by step."""
    found = [
        entry
        for entry in entries
        if entry.is_run_checkpoint and entry.shots == 0 and entry.prompt.sha256 == prompt_sha256
    ]
    return sorted(found, key=lambda entry: entry.step)


def select_best_entry(
    entries: Iterable[ScoreEntry], prompt_sha256: str, best_by: BestBy = "mean_perplexity"
) -> ScoreEntry | None:
    """Return the fine-tuned zero-shot entry with the lowest perplexity, the earliest of equals.

    Args:
        entries: entries of one data file.
        prompt_sha256: hash of the run's prompt; entries under other prompts do not count.
        best_by: the figure to compare.
    """
    candidates = finetuned_entries(entries, prompt_sha256)
    return min(candidates, key=lambda entry: (getattr(entry, best_by), entry.step), default=None)
