"""Adapters read from disk: their tensors and hashes, and adapters that change during scoring."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import save_adapter
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import load, load_file, save, save_file
from transformers import PreTrainedModel

from hw3.cli import main
from hw3.config.recipe import load_recipe
from hw3.evaluation import scorer
from hw3.modeling.adapter_io import (
    AdapterFiles,
    AdapterPrefetcher,
    InvalidAdapterError,
    parse_safetensors,
    read_adapter,
)
from hw3.runs.checkpoints import find_complete_checkpoints
from hw3.training.train import train

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=6,
    )
)
def test_parse_safetensors_equals_the_library(shapes: dict[str, tuple[list[int], torch.dtype]]) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items() if name != "__metadata__"}
    data = save(tensors, {"format": "pt"})
    parsed, expected = parse_safetensors(to_tensor(data)), load(data)
    assert parsed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert parsed[name].dtype == tensor.dtype and torch.equal(parsed[name], tensor)


def test_parse_safetensors_reads_unaligned_data() -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + torch.tensor([1.5]).numpy().tobytes()
    assert len(header) % 4
    assert parse_safetensors(to_tensor(data))["a"].tolist() == load(data)["a"].tolist() == [1.5]


@given(st.data())
def test_parse_safetensors_refuses_a_truncated_file(data: st.DataObject) -> None:
    complete = save({"a": torch.ones(3), "b": torch.ones(2, 2)})
    truncated = complete[: data.draw(st.integers(0, len(complete) - 1))]
    with pytest.raises(ValueError):
        parse_safetensors(to_tensor(truncated))


@given(st.integers(0, 300), st.binary(min_size=1, max_size=12))
def test_parse_safetensors_refuses_or_reads_a_corrupt_header(position: int, replacement: bytes) -> None:
    data = bytearray(save({"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(5).half()}))
    data[position : position + len(replacement)] = replacement
    try:
        tensors = parse_safetensors(to_tensor(bytes(data)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_read_adapter_names_the_folder_of_unreadable_files(scored_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scored_run / "checkpoint-4", tmp_path / "theirs")
    for content in (b"", b"cut", bytes(100), save({"a": torch.ones(2, dtype=torch.bool)})):
        (folder / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(InvalidAdapterError, match="theirs: cannot be read: "):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "NONE"}', encoding="utf-8")
    with pytest.raises(InvalidAdapterError, match="theirs: cannot be read: "):
        read_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_read_adapter_names_the_tensor_that_is_not_finite(scored_run: Path, tmp_path: Path, value: float) -> None:
    folder = shutil.copytree(scored_run / "checkpoint-4", tmp_path / "theirs")
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name][0, 1] = value
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapterError, match=re.escape(f"theirs: {name} has NaN or infinite weights")):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING"),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "P_TUNING"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]), "activated LoRA"),
        (
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa_niter_4"),
            "PiSSA with fast SVD",
        ),
    ],
)
def test_read_adapter_names_kinds_that_cannot_be_scored(
    mini_model: PreTrainedModel, tmp_path: Path, config: PeftConfig, kind: str
) -> None:
    folder = save_adapter(mini_model, tmp_path / "theirs", config)
    with pytest.raises(InvalidAdapterError, match=rf"theirs: this kind of adapter \({kind}\) cannot be scored: "):
        read_adapter(folder)


def test_read_adapter_names_the_package_that_a_kind_needs(scored_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scored_run / "checkpoint-4", tmp_path / "theirs")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config | loftq), encoding="utf-8")
    with pytest.raises(InvalidAdapterError, match=r"theirs: cannot be read: .*'scipy' is not installed"):
        read_adapter(folder)


def test_adapter_prefetcher_gives_the_hash_of_the_checkpoint(scored_run: Path) -> None:
    checkpoints = find_complete_checkpoints(scored_run)
    prefetcher = AdapterPrefetcher([checkpoint.path for checkpoint in checkpoints], pin_memory=False)
    for checkpoint in checkpoints:
        assert prefetcher.get(checkpoint.path).sha256 == checkpoint.sha256
    prefetcher.close()


def test_adapter_prefetcher_continues_after_an_invalid_adapter(scored_run: Path, tmp_path: Path) -> None:
    folders = [scored_run / "checkpoint-4", tmp_path, scored_run / "checkpoint-8"]
    prefetcher = AdapterPrefetcher(folders, pin_memory=False)
    assert prefetcher.get(folders[0]).folder == folders[0]
    with pytest.raises(InvalidAdapterError):
        prefetcher.get(folders[1])
    assert prefetcher.get(folders[2]).folder == folders[2]
    prefetcher.close()


def entries_by_checkpoint(run: Path) -> dict[str, dict]:
    results = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))
    return {entry["checkpoint"] or "base": entry for entry in results["entries"]}


def test_adapter_overwritten_after_it_was_hashed_is_not_scored(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(scored_run, tmp_path / "run")
    before = entries_by_checkpoint(run)
    shutil.rmtree(run / "eval")
    weights, others = (run / name / "adapter_model.safetensors" for name in ("checkpoint-8", "checkpoint-12"))
    original = weights.read_bytes()

    def overwrite(folder: Path, *, pin_memory: bool) -> AdapterFiles:
        if folder == run / "checkpoint-8":  # already hashed for the entry's key; the size stays the same
            weights.write_bytes(others.read_bytes())
        return read_adapter(folder, pin_memory=pin_memory)

    monkeypatch.setattr("hw3.modeling.adapter_io.read_adapter", overwrite)
    assert main(["eval", str(run)]) == 0
    assert "checkpoint-8: the weights changed after the checkpoint was completed" in capsys.readouterr().err
    assert entries_by_checkpoint(run).keys() == {"base", "checkpoint-4", "checkpoint-12"}
    # Once restored it is scored, with the same result as before.
    monkeypatch.undo()
    weights.write_bytes(original)
    assert main(["eval", str(run)]) == 0
    for name, entry in entries_by_checkpoint(run).items():
        assert entry["key"] == before[name]["key"]
        assert entry["mean_perplexity"] == before[name]["mean_perplexity"]


def test_adapter_overwritten_after_it_was_read_is_scored_as_read(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(scored_run, tmp_path / "run")
    before = entries_by_checkpoint(run)
    shutil.rmtree(run / "eval")
    score_rows = scorer.score_rows
    read_folders: set[Path] = set()

    def overwrite_and_score(*arguments: object, **options: object) -> object:
        for folder in run.glob("checkpoint-*"):
            if folder in read_folders:
                (folder / "adapter_model.safetensors").write_bytes(b"overwritten")
        return score_rows(*arguments, **options)

    def record_and_read(folder: Path, *, pin_memory: bool) -> AdapterFiles:
        files = read_adapter(folder, pin_memory=pin_memory)
        read_folders.add(folder)
        return files

    monkeypatch.setattr("hw3.modeling.adapter_io.read_adapter", record_and_read)
    monkeypatch.setattr("hw3.evaluation.scorer.score_rows", overwrite_and_score)
    assert main(["eval", str(run)]) == 0
    assert {name: entry["mean_perplexity"] for name, entry in entries_by_checkpoint(run).items()} == {
        name: entry["mean_perplexity"] for name, entry in before.items()
    }


def test_full_weights_overwritten_after_they_were_hashed_are_not_scored(
    mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "full"
    train(load_recipe(mini_recipe, ["lora=null", "quantization=null", "training.max_steps=8"]), run)
    first, second = (checkpoint.path / "model.safetensors" for checkpoint in find_complete_checkpoints(run))
    first.write_bytes(second.read_bytes())
    assert main(["eval", str(run)]) == 0
    assert "checkpoint-4: the weights changed after the checkpoint was completed" in capsys.readouterr().err
    assert entries_by_checkpoint(run).keys() == {"base", "checkpoint-8"}
