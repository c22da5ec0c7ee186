"""Adapters of all kinds, loaded in any order into one base, score as fresh loads by PEFT alone do."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compute_row_perplexity, save_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from tiny_models import GENERATION_SHAPE
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hw3.data.tokenization import EncodedRow
from hw3.evaluation.perplexity import score_rows
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import _prepare_loaded_model
from hw3.modeling.quantization import dequantize

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(**LORA),
    "LoRA on all linear layers": lambda: LoraConfig(**LORA | {"target_modules": "all-linear", "use_rslora": True}),
    "LoRA with biases": lambda: LoraConfig(**LORA, lora_bias=True),
    "LoRA on embeddings": lambda: LoraConfig(**LORA | {"target_modules": ["q_proj", "embed_tokens"]}),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "PiSSA": lambda: LoraConfig(**LORA, init_lora_weights="pissa"),
    "OLoRA": lambda: LoraConfig(**LORA, init_lora_weights="olora"),
    "orthogonal": lambda: LoraConfig(**LORA, init_lora_weights="orthogonal"),
    "bias: lora_only": lambda: LoraConfig(**LORA, bias="lora_only"),
    "bias: all": lambda: LoraConfig(**LORA, bias="all"),
    "saved embeddings": lambda: LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "saved norms": lambda: LoraConfig(**LORA, modules_to_save=["input_layernorm"]),
    "trained tokens": lambda: LoraConfig(**LORA, trainable_token_indices=[5, 9]),
    "only trained tokens": lambda: TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[6, 7]),
    "AdaLoRA": lambda: AdaLoraConfig(**TASK, total_step=10),
    "IA3": lambda: IA3Config(**TASK, feedforward_modules=[]),
    "layer norms": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "LoHa": lambda: LoHaConfig(**TASK, r=4),
    "LoKr": lambda: LoKrConfig(**TASK, r=4),
    "BOFT": lambda: BOFTConfig(**TASK, boft_block_size=8),
    "VeRA": lambda: VeraConfig(**TASK, r=4),
    "SHiRA": lambda: ShiraConfig(**TASK, r=2),
}
# PEFT 0.21.2 cannot load these into 4-bit layers.
NOT_IN_4_BITS = {"PiSSA", "orthogonal", "LoHa", "LoKr", "SHiRA"}
MAX_ERROR = 1e-5  # in nats per row
ROWS = [
    EncodedRow("a", [2, 30, 31, 32, 5, 6, 7], [9, 10, 1], 2),
    EncodedRow("b", [2, 30, 31, 32, 9], [5, 1], 1),
    EncodedRow("c", [2, 30, 31, 32, 40, 41, 42, 43, 44, 45], [6, 20, 21, 1], 3),
]


class Judge:
    """Adapters of every kind for one base, and their scores by PEFT alone.

    Args:
        base: the base's folder.
        folder: where adapters are written.
        in_4_bits: whether the base is loaded in 4 bits.
    """

    def __init__(self, base: Path, folder: Path, *, in_4_bits: bool) -> None:
        self.base, self.folder, self.in_4_bits = base, folder, in_4_bits
        self.kinds = [kind for kind in KINDS if not (in_4_bits and kind in NOT_IN_4_BITS)]
        self.score = cache(self._score)

    def load_base(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if self.in_4_bits else None
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(self.base, quantization_config=quantization, **options)
        return _prepare_loaded_model(model).eval()

    def _score(self, kind: str) -> tuple[Path, list[float]]:
        """Return the adapter's folder, and the negative log-likelihoods of the rows under a fresh load by PEFT."""
        folder = save_adapter(self.load_base(), self.folder / kind, KINDS[kind]())
        return folder, self.score_with_peft(folder, ROWS)

    def score_with_peft(self, folder: Path, rows: list[EncodedRow], dtype: torch.dtype = torch.float32) -> list[float]:
        model = PeftModel.from_pretrained(self.load_base(dtype), folder).eval()
        return [math.log(compute_row_perplexity(model, row)) * len(row.output_ids) for row in rows]


@pytest.fixture(scope="module", params=["tied", "tied, 4 bits", "untied", "untied, 4 bits"])
def judge(request: pytest.FixtureRequest, mini_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """A Gemma-2 with tied embeddings, or a Llama with biases and an output head of its own; in float32 or NF4."""
    folder, base = tmp_path_factory.mktemp("kinds"), mini_base
    if request.param.startswith("untied"):
        torch.manual_seed(0)
        config = LlamaConfig(**GENERATION_SHAPE, num_attention_heads=2, num_key_value_heads=1, attention_bias=True)
        base = folder / "base"
        LlamaForCausalLM(config).save_pretrained(base)
    return Judge(base, folder, in_4_bits=request.param.endswith("4 bits"))


def assert_scores(slot: AdapterSlot, judge: Judge, kind: str) -> None:
    folder, expected = judge.score(kind)
    slot.load(folder)
    scores = [score.nll for score in score_rows(slot.model, ROWS, tokens_per_batch=200)]
    assert scores == pytest.approx(expected, abs=MAX_ERROR), kind


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_adapters_of_any_kind_in_any_order_score_as_peft_alone(judge: Judge, data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(judge.kinds), min_size=2, max_size=4))
    base = judge.load_base()
    slot = AdapterSlot(dequantize(base) if judge.in_4_bits else base, judge.load_base, dequantized=judge.in_4_bits)
    for kind in kinds:
        assert_scores(slot, judge, kind)


@pytest.mark.slow
def test_every_kind_scores_as_peft_alone_and_leaves_no_trace(judge: Judge) -> None:
    base = judge.load_base()
    slot = AdapterSlot(dequantize(base) if judge.in_4_bits else base, judge.load_base, dequantized=judge.in_4_bits)
    for kind in judge.kinds:
        assert_scores(slot, judge, kind)
        assert_scores(slot, judge, "LoRA")
        assert_scores(slot, judge, kind)


@pytest.mark.parametrize("kind", ["LoRA", "PiSSA", "trained tokens", "IA3"])
def test_adapters_score_in_bfloat16_as_precisely_as_peft_alone(
    mini_base: Path, tmp_path: Path, encoded_rows: list[EncodedRow], kind: str
) -> None:
    """The RMS error against float32 is at most that of PEFT, row by row, as in `benchmarks/scoring_precision.py`."""
    judge = Judge(mini_base, tmp_path, in_4_bits=False)
    folder, _ = judge.score(kind)
    exact = torch.tensor(judge.score_with_peft(folder, encoded_rows))
    with_peft = torch.tensor(judge.score_with_peft(folder, encoded_rows, torch.bfloat16))
    slot = AdapterSlot(judge.load_base(torch.bfloat16))
    slot.load(folder)
    scores = torch.tensor([score.nll for score in score_rows(slot.model, encoded_rows, tokens_per_batch=200)])
    assert 0 < (scores - exact).square().mean() <= (with_peft - exact).square().mean()
