"""The replayed decoding step, and the models whose step can be captured."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda_graphs import patch_cuda_graphs
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from tiny_models import GENERATION_SHAPE, build_gemma2, build_llama
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from hw3.cuda_graphs.decoding_step import ReplayedStep, can_capture


def test_replayed_step_runs_eagerly_then_captures_then_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, calls, value = patch_cuda_graphs(monkeypatch), [], torch.ones(2)

    def add_one() -> torch.Tensor:
        calls.append(graphs.captures)
        return value + 1

    step, outputs = ReplayedStep(), []
    for number in range(5):
        value.fill_(number)
        outputs.append(step(add_one).tolist())
    assert outputs == [[number + 1.0] * 2 for number in range(5)]
    assert len(calls) == 2 and (graphs.captures, graphs.replays) == (1, 4)
    step.reset()
    step(add_one)
    assert len(calls) == 3 and (graphs.captures, graphs.replays) == (1, 4)


def can_capture_on(
    base: PreTrainedModel,
    adapter: PeftConfig | None = None,
    devices: tuple[str, ...] = ("cuda:0",),
    **config: object,
) -> bool:
    """Return what `can_capture` returns for a model with these devices, settings and adapter."""
    for name, value in config.items():
        setattr(base.config, name, value)
    if adapter is not None:
        get_peft_model(base, adapter)
    parameters = [SimpleNamespace(device=torch.device(device)) for device in devices]
    return can_capture(SimpleNamespace(config=base.config, modules=base.modules, parameters=lambda: parameters))


def test_can_capture_known_models_on_one_gpu() -> None:
    assert can_capture_on(build_llama()) and can_capture_on(build_gemma2())
    assert can_capture_on(build_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))


def test_can_capture_refuses_models_that_may_read_values() -> None:
    llama = build_llama
    assert not can_capture(llama())  # it is on the CPU
    assert not can_capture_on(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert not can_capture_on(llama(), devices=("cuda:0", "cuda:1"))
    assert not can_capture_on(llama(), devices=("cpu",))
    assert not can_capture_on(llama(), _attn_implementation="flash_attention_2")
    rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not can_capture_on(llama(), rope_parameters=rope_parameters)
    assert not can_capture_on(MistralForCausalLM._from_config(MistralConfig(**GENERATION_SHAPE, num_attention_heads=4)))
