"""Answers in any batch against one prompt at a time without a cache; limits, stops, ways to generate."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CHARACTERS, character_tokenizer, write_rows
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from recorded_graph import on_a_gpu
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from hw3.config.schema import GenerationSection
from hw3.data.batching import batches
from hw3.data.prompt import Prompt
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.generation.batch_generate import Answer, generate, generation_config, row_costs, stop_ids
from hw3.generation.decoder import Decoder, RoomyLayer, can_capture, grouped_attention, with_room
from hw3.generation.output_limits import AnswerLengths

STOPS = [1, 9, 23, 30]  # a random model seldom writes EOS: a few more, so that rows end at different times


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
}


def gemma() -> PreTrainedModel:
    """With soft-caps and a sliding window of 16 tokens, shorter than every prompt; tied, it would repeat itself."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **SMALL,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        tie_word_embeddings=False,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()


def llama() -> PreTrainedModel:
    """Another architecture, without soft-caps, under sdpa."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


GEMMA = gemma()


@pytest.fixture(params=["gemma", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return gemma() if request.param == "gemma" else llama()


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(
        character_tokenizer(), Prompt(system="天地玄黃宇宙洪荒日月盈昃辰宿列張" * 2, turn="問：{instruction}\n答：")
    )


@pytest.fixture
def rows(encoder: Encoder, tmp_path: Path) -> list[EncodedRow]:
    return [encoder.encode(row) for row in read_rows(write_rows(tmp_path / "rows.json", 24))]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, row: EncodedRow, limit: int) -> Answer:
    """Greedy search by its definition: the whole text through the model for every token."""
    ids = list(row.prompt_ids)
    while len(ids) < len(row.prompt_ids) + limit:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in STOPS:
            return Answer(ids[len(row.prompt_ids) : -1], True)
    return Answer(ids[len(row.prompt_ids) :], False)


def answers(
    model: PreTrainedModel, rows: list[EncodedRow], limits: list[int], *, batch_bytes: int = 2**40, **settings: object
) -> list[Answer]:
    found: dict[int, Answer] = {}
    config = generation_config(GenerationSection(**settings), STOPS)
    generate(model, rows, limits=limits, config=config, on_answer=found.__setitem__, batch_bytes=batch_bytes)
    return [found[place] for place in range(len(rows))]


def test_any_batch_equals_one_by_one(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    limits = [6 + number % 20 for number in range(len(rows))]
    wanted = [one_by_one(model, row, limit) for row, limit in zip(rows, limits, strict=True)]
    # Some end, at different times, and some are cut.
    assert {answer.finished for answer in wanted} == {True, False}
    assert len({len(answer.ids) for answer in wanted}) > 5
    assert answers(model, rows, limits) == wanted
    assert answers(model, rows, limits, batch_bytes=1) == wanted
    assert answers(model, rows[::-1], limits[::-1], batch_bytes=1_500_000)[::-1] == wanted


@pytest.fixture
def sizes(model: PreTrainedModel) -> list[int]:
    """How many rows each forward took."""
    found: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: found.append(len(inputs["input_ids"])), with_kwargs=True
    )
    return found


# By architecture: prompts with a common beginning, and without one.
PARTS = {"gemma2": ([8, 10, 6], [3, 3, 3, 3, 5, 5, 2]), "llama": ([7, 8, 9], [3, 3, 3, 3, 4, 4, 4])}


def test_prompts_run_in_parts_of_a_batch(
    model: PreTrainedModel, rows: list[EncodedRow], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of 24 rows fit where a few prompts do; keys and values outgrow their room several times."""
    monkeypatch.setattr("hw3.generation.decoder.ROOM", 4)
    limits = [6 + number % 20 for number in range(len(rows))]
    apart = [EncodedRow(row.id, row.prompt_ids[number:], [], 0) for number, row in enumerate(rows)]
    wanted, wanted_apart = (
        [one_by_one(model, row, limit) for row, limit in zip(some, limits, strict=True)] for some in (rows, apart)
    )
    parts, parts_apart = PARTS[model.config.model_type]
    sizes.clear()
    assert answers(model, rows, limits, batch_bytes=6_400_000) == wanted
    assert sizes[: len(parts) + 2] == [1, *parts, 24]  # the common beginning, prompts, a token
    sizes.clear()
    assert answers(model, apart, limits, batch_bytes=6_400_000) == wanted_apart
    assert sizes[: len(parts_apart) + 1] == [*parts_apart, 24]  # shorter prompts, more of them


@pytest.mark.parametrize("share", [1 / 8, 1 / 2])
def test_rows_leave_their_batch_some_at_a_time(
    model: PreTrainedModel,
    rows: list[EncodedRow],
    sizes: list[int],
    share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An eighth of a batch; half of it where the step is captured again for those that are left."""
    limits = [4 + number for number in range(len(rows))]
    wanted = [one_by_one(model, row, limit) for row, limit in zip(rows, limits, strict=True)]
    if share == 1 / 2:
        monkeypatch.setattr(Decoder, "least_leaving", share)
    sizes.clear()
    found = answers(model, rows, limits)
    assert found == wanted
    lengths = sorted(len(answer.ids) + answer.finished for answer in found)
    going, expected = 24, []
    for step in range(1, lengths[-1]):
        left = sum(length > step for length in lengths)
        going = left if going - left >= share * going else going
        expected.append(going)
    assert sizes == [1, 24, *expected] and len(set(expected)) > 3


# By architecture and tokens of room: steps that run as they are, captures, replays.
CAPTURED = {("gemma2", 64): (5, 4, 13), ("gemma2", 5): (6, 5, 12), ("llama", 64): (5, 5, 19), ("llama", 5): (8, 5, 16)}


@pytest.mark.parametrize("room", [64, 5])
def test_a_captured_step(
    model: PreTrainedModel, rows: list[EncodedRow], room: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of each shape runs as it is, the next is captured; room is made and rows leave in between."""
    monkeypatch.setattr("hw3.generation.decoder.ROOM", room)
    graphs = on_a_gpu(monkeypatch)
    limits = [6 + number % 20 for number in range(len(rows))]
    wanted = [one_by_one(model, row, limit) for row, limit in zip(rows, limits, strict=True)]
    sizes.clear()
    assert answers(model, rows, limits) == wanted
    alone, captures, replays = CAPTURED[model.config.model_type, room]
    assert (graphs.captures, graphs.replays) == (captures, replays)
    assert alone + replays == max(len(answer.ids) + answer.finished for answer in wanted) - 1
    assert len(sizes) == 2 + alone + captures  # the common beginning, prompts, steps, what is captured
    apart = [EncodedRow(row.id, row.prompt_ids[number:], [], 0) for number, row in enumerate(rows)]
    assert answers(model, apart, limits) == [
        one_by_one(model, row, limit) for row, limit in zip(apart, limits, strict=True)
    ]


def test_what_can_be_captured() -> None:
    """A known architecture and attention on one GPU, a rope of fixed length, LoRA or no adapter."""

    def found(
        base: PreTrainedModel,
        adapter: PeftConfig | None = None,
        devices: tuple[str, ...] = ("cuda:0",),
        **config: object,
    ) -> bool:
        for name, value in config.items():
            setattr(base.config, name, value)
        if adapter is not None:
            get_peft_model(base, adapter)
        placed = [SimpleNamespace(device=torch.device(device)) for device in devices]
        return can_capture(SimpleNamespace(config=base.config, modules=base.modules, parameters=lambda: placed))

    assert not can_capture(llama()) and found(llama()) and found(gemma())
    assert found(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    assert not found(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert not found(llama(), devices=("cuda:0", "cuda:1")) and not found(llama(), devices=("cpu",))
    assert not found(llama(), _attn_implementation="flash_attention_2")
    assert not found(llama(), rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert not found(MistralForCausalLM._from_config(MistralConfig(**SMALL, num_attention_heads=4)))


@pytest.mark.slow
def test_a_mask_that_is_worked_out_late(rows: list[EncodedRow]) -> None:
    """`flex_attention` asks where a window ends when keys have been written."""
    model = gemma()
    wanted = [one_by_one(model, row, 6) for row in rows[:3]]
    model.set_attn_implementation("flex_attention")
    assert answers(model, rows[:3], [6] * 3) == wanted


def test_grouped_attention_takes_the_place_of_eager(rows: list[EncodedRow], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a layer and new token; prompts as they are."""
    model, shapes = gemma(), []
    real = ALL_ATTENTION_FUNCTIONS["eager_grouped"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "eager_grouped",
        lambda module, query, *rest, **settings: shapes.append(query.shape) or real(module, query, *rest, **settings),
    )
    found = answers(model, rows, [5] * len(rows))
    steps = max(len(answer.ids) + answer.finished for answer in found) - 1
    assert len(shapes) == 2 * steps and shapes[0] == (24, 2, 1, 32)
    assert model.config._attn_implementation == "eager"


def test_rows_with_room() -> None:
    """Two rows of one token and one of three, two numbers a token."""
    short, long = torch.full((2, 1, 1, 2), 5.0), torch.arange(1.0, 7).reshape(1, 1, 3, 2)
    room = with_room([short, long])
    assert room.shape == (3, 1, 3 + 64, 2)
    assert room[:, 0, :3].tolist() == [[[0, 0], [0, 0], [5, 5]]] * 2 + [[[1, 2], [3, 4], [5, 6]]]
    assert room[:, :, 3:].abs().max() == 0
    cache = DynamicLayer()
    cache.update(long, long)
    layer = RoomyLayer([cache])
    before = layer.get_seq_length()
    keys, _ = layer.update(long[:, :, :1] + 10, long[:, :, :1])
    assert (int(before), int(layer.get_seq_length())) == (3, 4) and keys[0, 0, 2:5].tolist() == [
        [5, 6],
        [11, 12],
        [0, 0],
    ]


@torch.no_grad()
def test_grouped_attention_is_eager_attention() -> None:
    """Three rows, one of which sees four places of nine; two heads that share keys and values, and soft-caps."""
    attention = gemma().model.layers[0].self_attn
    settings = {"scaling": 0.2, "softcap": 50.0}
    query, key, value = (torch.randn(3, heads, length, 32) for heads, length in ((4, 1), (2, 9), (2, 9)))
    mask = torch.zeros(3, 1, 1, 9)
    mask[1, ..., :5] = torch.finfo(torch.float32).min
    wanted = eager_attention_forward(attention, query, key, value, mask, **settings)[0]
    found = grouped_attention(attention, query, key, value, mask, **settings)[0]
    assert found.shape == wanted.shape == (3, 1, 4, 32)
    assert attention.num_key_value_groups == 2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (found[:, :, 0] - wanted[:, :, 1]).abs().max() > 0.1  # heads are not alike


@given(lengths=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=30))
def test_a_batch_fits_with_its_longest_prompt_and_longest_limit(lengths: list[tuple[int, int]]) -> None:
    """Keys and values of two layers and one more, and of two heads: 2 x 32 numbers of 4 bytes a token each."""
    prompts, limits = map(list, zip(*lengths, strict=True))
    memory = 3_000_000
    for batch in batches(row_costs(GEMMA, prompts, limits), memory):
        tokens = max(prompts[index] for index in batch) + max(limits[index] for index in batch) + 64
        assert len(batch) == 1 or len(batch) * (2 * 32 * 4 * (3 + 2) * tokens + 3 * 4 * 64) <= memory
    assert row_costs(GEMMA, [100], [28]) == [2 * 32 * 4 * 5 * 192 + 768]


def test_prompts_without_a_common_beginning(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    apart = [EncodedRow(row.id, row.prompt_ids[number:], [], 0) for number, row in enumerate(rows)]
    wanted = [one_by_one(model, row, 12) for row in apart]
    assert answers(model, apart, [12] * len(rows)) == wanted


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
def test_other_ways_equal_one_by_one(
    model: PreTrainedModel, rows: list[EncodedRow], settings: dict[str, object]
) -> None:
    together = answers(model, rows, [14] * len(rows), **settings)
    assert together == [answers(model, [row], [14], **settings)[0] for row in rows]
    greedy = answers(model, rows, [14] * len(rows))
    assert (together == greedy) == ("do_sample" in settings)  # the likeliest token alone is greedy search


def test_sampling_follows_the_seed(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(answers(model, rows, [14] * len(rows), do_sample=True))
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_settings_of_the_base_do_not_leak_in(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    wanted = answers(model, rows, [14] * len(rows))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=2.0, max_length=20, eos_token_id=[5], pad_token_id=0
    )
    assert stop_ids(model, 1) == [1, 5]
    assert answers(model, rows, [14] * len(rows)) == wanted


def test_stop_ids(model: PreTrainedModel) -> None:
    for own, wanted in ((None, [1]), (1, [1]), (7, [1, 7]), ([7, 1, 8], [1, 7, 8])):
        model.generation_config.eos_token_id = own
        assert stop_ids(model, 1) == wanted


def test_limits_follow_the_training_rows(encoder: Encoder) -> None:
    """A token a character: 9 and EOS, 24 and EOS, 19 and EOS."""
    training = [
        Row(str(size), CHARACTERS[:size], CHARACTERS[0] * output) for size, output in ((4, 9), (10, 24), (20, 19))
    ]
    lengths = AnswerLengths(training, encoder)
    limits = {size: lengths.limit("問" * size) for size in (1, 4, 9, 10, 20, 30, 40)}
    assert limits == {1: 32, 4: 32, 9: 32, 10: 50, 20: 50, 30: 75, 40: 100}
