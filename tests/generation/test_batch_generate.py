"""Batched generation against one prompt at a time without a cache: batches, limits, stop tokens, settings."""

import pytest
import torch
from reference_generation import (
    count_new_tokens,
    generate_batched,
    generate_one_by_one,
    without_common_prefix,
)
from tiny_models import OTHER_ARCHITECTURES, build_gemma2, build_other_architecture
from transformers import GenerationConfig, PreTrainedModel

from hw3.data.tokenization import EncodedRow
from hw3.generation.batch_generate import get_stop_token_ids
from hw3.generation.decoder import Decoder


def test_generate_in_any_batch_equals_one_by_one(
    model: PreTrainedModel, rows: list[EncodedRow], limits: list[int]
) -> None:
    expected = generate_one_by_one(model, rows, limits)
    # Some outputs finish, at different times, and some are cut.
    assert {generation.finished for generation in expected} == {True, False}
    assert len({len(generation.token_ids) for generation in expected}) > 5
    assert generate_batched(model, rows, limits) == expected
    assert generate_batched(model, rows, limits, batch_bytes=1) == expected
    assert generate_batched(model, rows[::-1], limits[::-1], batch_bytes=1_500_000)[::-1] == expected


def test_generate_without_a_common_prefix_equals_one_by_one(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    rows, limits = without_common_prefix(rows), [12] * len(rows)
    assert generate_batched(model, rows, limits) == generate_one_by_one(model, rows, limits)


# By architecture: sizes of the prefill's parts, with a common prefix and without one.
PREFILL_SIZES = {"gemma2": ([8, 10, 6], [3, 3, 3, 3, 5, 5, 2]), "llama": ([7, 8, 9], [3, 3, 3, 3, 4, 4, 4])}


def test_generate_prefills_a_batch_in_parts(
    model: PreTrainedModel,
    rows: list[EncodedRow],
    limits: list[int],
    forward_sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 rows are decoded in the memory in which a few prompts are computed; the cache grows several times."""
    monkeypatch.setattr("hw3.generation.decoder.CACHE_GROWTH_TOKENS", 4)
    other_rows = without_common_prefix(rows)
    expected = generate_one_by_one(model, rows, limits)
    expected_of_others = generate_one_by_one(model, other_rows, limits)
    sizes, sizes_of_others = PREFILL_SIZES[model.config.model_type]
    forward_sizes.clear()
    assert generate_batched(model, rows, limits, batch_bytes=6_400_000) == expected
    assert forward_sizes[: len(sizes) + 2] == [1, *sizes, 24]  # the common prefix, prompts, one decoding step
    forward_sizes.clear()
    assert generate_batched(model, other_rows, limits, batch_bytes=6_400_000) == expected_of_others
    assert forward_sizes[: len(sizes_of_others) + 1] == [*sizes_of_others, 24]


@pytest.mark.parametrize("fraction", [1 / 8, 1 / 2])
def test_generate_removes_finished_rows_from_their_batch(
    model: PreTrainedModel,
    rows: list[EncodedRow],
    forward_sizes: list[int],
    fraction: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An eighth of the batch at a time; with CUDA graphs half of it, since the step is captured again."""
    limits = [4 + number for number in range(len(rows))]
    expected = generate_one_by_one(model, rows, limits)
    if fraction == 1 / 2:
        monkeypatch.setattr(Decoder, "min_finished_fraction", fraction)
    forward_sizes.clear()
    generations = generate_batched(model, rows, limits)
    assert generations == expected
    lengths = sorted(map(count_new_tokens, generations))
    batch_size, expected_sizes = 24, []
    for step in range(1, lengths[-1]):
        active = sum(length > step for length in lengths)
        batch_size = active if batch_size - active >= fraction * batch_size else batch_size
        expected_sizes.append(batch_size)
    assert forward_sizes == [1, 24, *expected_sizes] and len(set(expected_sizes)) > 3


@pytest.mark.slow
def test_generate_with_flex_attention_equals_one_by_one(rows: list[EncodedRow]) -> None:
    """`flex_attention` evaluates its mask after keys have been written."""
    model = build_gemma2()
    expected = generate_one_by_one(model, rows[:3], [6] * 3)
    model.set_attn_implementation("flex_attention")
    assert generate_batched(model, rows[:3], [6] * 3) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 1},
    ],
)
def test_generate_with_other_settings_equals_one_row_at_a_time(
    model: PreTrainedModel, rows: list[EncodedRow], settings: dict[str, object]
) -> None:
    batched = generate_batched(model, rows, [14] * len(rows), **settings)
    assert batched == [generate_batched(model, [row], [14], **settings)[0] for row in rows]
    greedy = generate_batched(model, rows, [14] * len(rows))
    assert (batched == greedy) == ("do_sample" in settings)  # sampling from one candidate is greedy search


def test_sampling_follows_the_seed(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(generate_batched(model, rows, [14] * len(rows), do_sample=True))
    assert samples[0] == samples[1] != samples[2]


def test_generate_ignores_the_base_models_generation_config(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    expected = generate_batched(model, rows, [14] * len(rows))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=2.0, max_length=20, eos_token_id=[5], pad_token_id=0
    )
    assert get_stop_token_ids(model, 1) == [1, 5]
    assert generate_batched(model, rows, [14] * len(rows)) == expected


def test_get_stop_token_ids_adds_those_of_the_base_model(model: PreTrainedModel) -> None:
    for own, expected in ((None, [1]), (1, [1]), (7, [1, 7]), ([7, 1, 8], [1, 7, 8])):
        model.generation_config.eos_token_id = own
        assert get_stop_token_ids(model, 1) == expected


@pytest.mark.parametrize("name", OTHER_ARCHITECTURES)
def test_other_architectures_give_the_outputs_of_one_prompt_at_a_time(
    name: str, rows: list[EncodedRow], limits: list[int]
) -> None:
    model = build_other_architecture(name)
    rows, limits = rows[:8], limits[:8]
    assert generate_batched(model, rows, limits) == generate_one_by_one(model, rows, limits)
