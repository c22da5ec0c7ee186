"""Decoding on a GPU: the step is captured again after rows have left and after 64 tokens, and outputs stay right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import save_adapter
from peft import LoraConfig
from transformers import PreTrainedModel

from hw3.config.recipe import load_recipe
from hw3.config.schema import GenerationSection
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.generation.batch_generate import Generation, _prefill, build_generation_config, generate
from hw3.generation.decoder import CACHE_GROWTH_TOKENS, Decoder
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base_model, load_tokenizer
from hw3.modeling.logits import allow_tf32_for_adapters
from hw3.modeling.quantization import dequantize

pytestmark = pytest.mark.gpu

# Half of the rows leave at this step; the cache is full after 64 tokens, and again after 128.
STEP_WITH_FEWER_ROWS, STEPS = 20, 140
# The rounding of bfloat16, relative to the standard deviation of the compared values. The most probable of 64 random
# tokens is 2.4 standard deviations above their mean.
TOLERANCE = 0.1
STOP_TOKEN_ID = 63  # no character has this id


@pytest.fixture(scope="module", params=["4-bit", "dequantized"])
def model(
    request: pytest.FixtureRequest, shape_recipe: Path, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedModel:
    """A base of a recipe's shape in 4 bits, or dequantized, with a random adapter in it, as in `hw3 predict`."""
    recipe = load_recipe(shape_recipe, [])
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapter = save_adapter(load_base_model(recipe, device), tmp_path_factory.mktemp("adapter"), config)
    base = load_base_model(recipe, device)
    is_dequantized = request.param == "dequantized"
    slot = AdapterSlot(dequantize(base) if is_dequantized else base, dequantized=is_dequantized)
    slot.load(adapter)
    return slot.model.eval()


@pytest.fixture
def rows(shape_recipe: Path) -> list[EncodedRow]:
    """The 10 rows of the recipe's evaluation file and 14 of its training file, of different lengths."""
    recipe = load_recipe(shape_recipe, [])
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    files = read_rows(Path(recipe.data.eval)), read_rows(Path(recipe.data.train))
    return [encoder.encode(row) for row in [*files[0], *files[1][:14]]]


def start_decoding(model: PreTrainedModel, rows: list[EncodedRow]) -> Decoder:
    width = max(len(row.prompt_ids) for row in rows)
    padding = [[0] * (width - len(row.prompt_ids)) for row in rows]
    ids = torch.tensor([zeros + row.prompt_ids for zeros, row in zip(padding, rows, strict=True)], device=model.device)
    mask = torch.tensor([zeros + [1] * (width - len(zeros)) for zeros in padding], device=model.device)
    return _prefill(model, ids, mask, None, [len(rows)])[1]


@torch.inference_mode()
def test_replayed_steps_equal_eager_ones_after_rows_have_left_and_after_64_tokens(
    model: PreTrainedModel, rows: list[EncodedRow]
) -> None:
    """The second decoder drops its graph before each step, so that each of its steps runs eagerly."""
    generator = torch.Generator(model.device).manual_seed(0)
    tokens = torch.randint(4, 40, (STEPS, len(rows), 1), generator=generator, device=model.device)
    steps_not_replayed = []
    with allow_tf32_for_adapters(model):
        replayed, eager = start_decoding(model, rows), start_decoding(model, rows)
        is_kept = torch.arange(len(rows), device=model.device) % 2 == 0
        for step in range(STEPS):
            if step == STEP_WITH_FEWER_ROWS:
                replayed.keep(is_kept)
                eager.keep(is_kept)
            new = tokens[step] if step < STEP_WITH_FEWER_ROWS else tokens[step][is_kept]
            eager._drop_graph()
            expected, found = eager.step(new), replayed.step(new)
            assert (found - expected).abs().max() < TOLERANCE * expected.std(), step
            assert replayed._replayed_step is not None
            if replayed._replayed_step._graph is None:
                steps_not_replayed.append(step)
    assert steps_not_replayed == [0, STEP_WITH_FEWER_ROWS, CACHE_GROWTH_TOKENS, 2 * CACHE_GROWTH_TOKENS]


@torch.inference_mode()
def find_less_probable_token(model: PreTrainedModel, row: EncodedRow, token_ids: list[int]) -> int | None:
    """Return the first new position whose token is not the most probable one after the complete text before it."""
    ids = torch.tensor([row.prompt_ids + token_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(row.prompt_ids) :, None]).squeeze(1)
    is_less_probable = chosen < logits.amax(-1) - TOLERANCE * logits.std()
    return int(is_less_probable.nonzero()[0]) if is_less_probable.any() else None


def test_generated_tokens_are_the_most_probable_after_the_complete_text(
    model: PreTrainedModel, rows: list[EncodedRow]
) -> None:
    """Rows leave the batch at their limits; the last eight have 150 tokens."""
    model.get_output_embeddings().weight.data[STOP_TOKEN_ID] = 0  # so that it is never the most probable
    limits = [150 if number % 3 == 0 else 5 + number for number in range(len(rows))]
    generations: dict[int, Generation] = {}
    config = build_generation_config(GenerationSection(), [STOP_TOKEN_ID])
    generate(model, rows, max_new_tokens=limits, generation_config=config, on_generation=generations.__setitem__)
    for number, row in enumerate(rows):
        token_ids = generations[number].token_ids
        assert len(token_ids) == limits[number]
        assert find_less_probable_token(model, row, token_ids) is None, row.id
    assert len({token_id for generation in generations.values() for token_id in generation.token_ids}) > 3
