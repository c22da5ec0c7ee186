"""Row perplexities against the definition, one row at a time; the figures made of them; intervals."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import write_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe
from hw3.data.batching import batches, common_prefix
from hw3.data.prompt import Prompt
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.bootstrap import bootstrap_interval
from hw3.evaluation.perplexity import RowScore, score_rows, summarize
from hw3.modeling.adapter_io import BadAdapter
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base, load_tokenizer
from hw3.modeling.logits import check_head
from hw3.modeling.quantization import dequantize, scores_dequantized
from hw3.runs.checkpoints import complete_checkpoints
from hw3.training.train import train


@pytest.fixture
def model(mini_base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(mini_base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def rows(mini_recipe: Path, tmp_path: Path) -> list[EncodedRow]:
    recipe = load_recipe(mini_recipe)
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    return [encoder.encode(row) for row in read_rows(write_rows(tmp_path / "rows.json", 30))]


@torch.no_grad()
def definition(model: PreTrainedModel, row: EncodedRow) -> float:
    """The course's metric as its text says it, in float64 from the model's own logits."""
    ids = row.prompt_ids + row.output_ids
    probabilities = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    losses = [-math.log(probabilities[at - 1, ids[at]]) for at in range(len(row.prompt_ids), len(ids))]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [1, 64, 100, 10_000])
def test_rows_equal_the_definition_in_any_batch(
    model: PreTrainedModel, rows: list[EncodedRow], tokens_per_batch: int, reuse_prefix: bool
) -> None:
    """The model's window of 16 tokens ends inside the prompt, so the prefix is cut by it too."""
    scores = score_rows(model, rows, tokens_per_batch=tokens_per_batch, reuse_prefix=reuse_prefix)
    assert [score.id for score in scores] == [row.id for row in rows]
    for score, row in zip(scores, rows, strict=True):
        assert score.perplexity == pytest.approx(definition(model, row), rel=1e-5)
        assert score.tokens == len(row.output_ids) and score.characters == len(row.output_ids) - 1
    backwards = score_rows(model, rows[::-1], tokens_per_batch=tokens_per_batch, reuse_prefix=reuse_prefix)[::-1]
    for score, other in zip(scores, backwards, strict=True):
        assert other.perplexity == pytest.approx(score.perplexity, rel=1e-6)


def test_batches_keep_the_budget_and_lose_no_row(rows: list[EncodedRow]) -> None:
    for budget in (1, 90, 400):
        lengths = [len(row) for row in rows]
        found = list(batches(lengths, budget))
        assert sorted(index for batch in found for index in batch) == list(range(len(rows)))
        for batch in found:
            assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def test_common_prefix() -> None:
    def prefix(*prompts: list[int]) -> int:
        return common_prefix([EncodedRow(str(number), prompt, [1], 0) for number, prompt in enumerate(prompts)])

    assert prefix([2, 5, 6, 7], [2, 5, 6, 8, 9]) == 3
    # One id at least is left: it predicts the first output token.
    assert prefix([2, 5, 6], [2, 5, 6, 7]) == 2 and prefix([2, 5], [2, 5]) == 1
    assert prefix([2], [3]) == 0 and prefix([4, 5], [3, 5]) == 0


def test_progress_counts_rows(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    seen: list[int] = []
    score_rows(model, rows, tokens_per_batch=100, on_batch=seen.append)
    assert sum(seen) == len(rows) and len(seen) > 3


def test_figures() -> None:
    """Two rows: one token at log 2, three tokens at log 8 in all (2 each)."""
    scores = [RowScore("a", math.log(8), 1, 1), RowScore("b", 3 * math.log(2), 3, 2)]
    figures = summarize(scores)
    assert figures.mean_perplexity == pytest.approx((8 + 2) / 2)
    assert figures.token_perplexity == pytest.approx(2 ** (6 / 4))
    assert figures.median_perplexity == pytest.approx(5)
    assert figures.bits_per_character == pytest.approx(6 / 3)
    assert (figures.rows, figures.tokens) == (2, 4)


def test_interval() -> None:
    values = [float(number) for number in range(100)]
    low, high = bootstrap_interval(values, samples=2000, seed=0)
    # The mean's standard error is 28.9 / 10, so about 49.5 - 5.7 and 49.5 + 5.7.
    assert low == pytest.approx(43.8, abs=0.4) and high == pytest.approx(55.2, abs=0.4)
    assert bootstrap_interval(values, samples=2000, seed=0) == (low, high)
    assert bootstrap_interval([3.0], samples=10, seed=0) == (3.0, 3.0)


def test_interval_drawn_in_pieces_is_that_of_one_resample_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).lognormal(2, 2, 251)
    generator = np.random.default_rng(9)
    means = [values[generator.integers(0, 251, 251)].mean() for _ in range(100)]
    expected = tuple(np.quantile(means, (0.025, 0.975)))
    for at_once in (1, 251 * 7, 10**6):
        monkeypatch.setattr("hw3.evaluation.bootstrap._DRAWN_AT_ONCE", at_once)
        assert bootstrap_interval(list(values), samples=100, seed=9) == expected


def test_a_model_that_scales_its_logits_is_refused(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    check_head(model, rows[0])
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits)
    forward = model.forward

    def scaled(**inputs: torch.Tensor):
        outputs = forward(**inputs)
        outputs.logits = outputs.logits * 2
        return outputs

    model.forward = scaled
    with pytest.raises(UserError, match="cannot be scored"):
        check_head(model, rows[0])


def test_adapters_swapped_equal_fresh_loads(mini_recipe: Path, tmp_path: Path, rows: list[EncodedRow]) -> None:
    """[A, B] equals B alone, bit for bit, on an NF4 base; and the definition through a fresh PEFT load."""
    from peft import PeftModel

    recipe = load_recipe(mini_recipe)
    train(recipe, tmp_path / "run")
    folders = [checkpoint.path for checkpoint in complete_checkpoints(tmp_path / "run")]
    base = load_base(recipe, torch.device("cpu")).eval()
    untouched = score_rows(base, rows, tokens_per_batch=200)
    slot = AdapterSlot(base)
    swapped = []
    for folder in (folders[0], folders[2], folders[1]):
        slot.load(folder)
        swapped.append(score_rows(base, rows, tokens_per_batch=200))
    alone = load_base(recipe, torch.device("cpu")).eval()
    AdapterSlot(alone).load(folders[1])
    assert score_rows(alone, rows, tokens_per_batch=200) == swapped[2]
    assert len({score[0].nll for score in (untouched, *swapped)}) == 4
    fresh = PeftModel.from_pretrained(load_base(recipe, torch.device("cpu")), folders[1]).eval()
    for score, row in zip(swapped[2], rows, strict=True):
        assert score.perplexity == pytest.approx(definition(fresh, row), rel=1e-5)


def test_adapters_of_other_kinds_swapped_equal_fresh_loads(
    mini_base: Path, tmp_path: Path, rows: list[EncodedRow]
) -> None:
    """Plain LoRA, DoRA, other layers, in any order; one that does not fit leaves the slot as good as new."""

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(mini_base, attn_implementation="eager").eval()

    def score(slot: AdapterSlot) -> list[float]:
        return [score.nll for score in score_rows(slot._base, rows, tokens_per_batch=200)]

    kinds: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": "all-linear"},
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "queries": {"target_modules": ["q_proj"]},
    }
    torch.manual_seed(0)
    alone = {}
    for name, options in kinds.items():
        adapted = get_peft_model(base(), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / name)
        slot = AdapterSlot(base())
        slot.load(tmp_path / name)
        alone[name] = score(slot)
    config = json.loads((tmp_path / "queries/adapter_config.json").read_text())
    shutil.copytree(tmp_path / "queries", tmp_path / "foreign")
    (tmp_path / "foreign/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    slot = AdapterSlot(base())
    with pytest.raises(BadAdapter, match=r"foreign: it does not fit the base: .*c_attn"):
        slot.load(tmp_path / "foreign")
    for name in ("plain", "dora", "plain", "queries", "dora", "queries", "plain"):
        slot.load(tmp_path / name)
        assert score(slot) == alone[name], name
        with pytest.raises(BadAdapter, match="it does not fit the base"):
            slot.load(tmp_path / "foreign")


def test_dequantized_once_is_the_same_bit_for_bit(mini_recipe: Path, rows: list[EncodedRow]) -> None:
    recipe = load_recipe(mini_recipe)
    packed = load_base(recipe, torch.device("cpu")).eval()
    plain = dequantize(load_base(recipe, torch.device("cpu")).eval())
    assert not any(isinstance(module, Linear4bit) for module in plain.modules())
    assert score_rows(plain, rows, tokens_per_batch=200) == score_rows(packed, rows, tokens_per_batch=200)


def test_dequantized_once_is_the_same_with_an_adapter_in_bfloat16(
    mini_recipe: Path, tmp_path: Path, rows: list[EncodedRow]
) -> None:
    """PEFT itself would round the adapter's share to bfloat16 before adding it, to a 4-bit layer alone."""
    train(load_recipe(mini_recipe), tmp_path / "run")
    adapter = complete_checkpoints(tmp_path / "run")[-1].path
    recipe = load_recipe(mini_recipe, ["model.dtype=bfloat16", "quantization.bnb_4bit_compute_dtype=bfloat16"])
    scored = []
    for make_plain in (False, True):
        base = load_base(recipe, torch.device("cpu")).eval()
        base = dequantize(base) if make_plain else base
        AdapterSlot(base).load(adapter)
        scored.append(score_rows(base, rows, tokens_per_batch=200))
    assert scored[0] == scored[1]


def test_dequantized_where_both_ways_compute_alike(mini_recipe: Path) -> None:
    cpu = torch.device("cpu")
    assert scores_dequantized(load_recipe(mini_recipe), 100, cpu)
    assert not scores_dequantized(load_recipe(mini_recipe, ["quantization=null"]), 100, cpu)
    mixed = load_recipe(mini_recipe, ["quantization.bnb_4bit_compute_dtype=bfloat16"])
    assert not scores_dequantized(mixed, 100, cpu)


def test_out_of_range_is_an_error_not_a_score(model: PreTrainedModel, rows: list[EncodedRow]) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="out of the range of torch"):
        score_rows(model, rows, tokens_per_batch=100)


def test_inert_and_incomplete_adapters_are_named(mini_recipe: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe = load_recipe(mini_recipe, ["training.max_steps=4"])
    train(recipe, tmp_path / "run")
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    file = checkpoint.path / "adapter_model.safetensors"
    weights = load_file(file)
    slot = AdapterSlot(load_base(recipe, torch.device("cpu")))
    save_file({name: tensor for index, (name, tensor) in enumerate(weights.items()) if index}, file)
    with pytest.raises(BadAdapter, match="1 weights do not fit the base; it misses"):
        slot.load(checkpoint.path)
    save_file({name: tensor * ("lora_B" not in name) for name, tensor in weights.items()}, file)
    with pytest.raises(BadAdapter, match="every B matrix is zero"):
        slot.load(checkpoint.path)
    save_file({name: tensor[:2].contiguous() for name, tensor in weights.items()}, file)
    with pytest.raises(BadAdapter, match="its weights do not fit the base"):
        slot.load(checkpoint.path)


def test_prompt_defaults_to_the_instruction_alone() -> None:
    assert Prompt().turn == "{instruction}"
