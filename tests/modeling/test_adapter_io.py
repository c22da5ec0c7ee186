"""Adapters read once: tensors as safetensors reads them, the hash of the same bytes, the next one ahead of its turn."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from hw3.cli import main
from hw3.evaluation import scorer
from hw3.modeling.adapter_io import AdapterFiles, BadAdapter, ReadAhead, read_adapter, tensors_of
from hw3.runs.checkpoints import complete_checkpoints
from hw3.training.train import train

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def content(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
        max_size=6,
    )
)
def test_tensors_are_those_of_the_library(shapes: dict[str, tuple[list[int], torch.dtype]]) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items() if name != "__metadata__"}
    data = save(tensors, {"format": "pt"})
    ours, theirs = tensors_of(content(data)), load(data)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)


def test_unaligned_data_is_read() -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + torch.tensor([1.5]).numpy().tobytes()
    assert len(header) % 4
    assert tensors_of(content(data))["a"].tolist() == load(data)["a"].tolist() == [1.5]


@given(st.data())
def test_a_cut_file_is_refused(data: st.DataObject) -> None:
    whole = save({"a": torch.ones(3), "b": torch.ones(2, 2)})
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ValueError):
        tensors_of(content(cut))


@given(st.integers(0, 300), st.binary(min_size=1, max_size=12))
def test_a_spoiled_header_is_refused_or_read(at: int, bytes_there: bytes) -> None:
    data = bytearray(save({"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.ones(5).half()}))
    data[at : at + len(bytes_there)] = bytes_there
    try:
        tensors = tensors_of(content(bytes(data)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def test_what_is_no_adapter_is_named(scored_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(scored_run / "checkpoint-4", tmp_path / "theirs")
    for spoiled in (b"", b"cut", bytes(100), save({"a": torch.ones(2, dtype=torch.int64)})):
        (folder / "adapter_model.safetensors").write_bytes(spoiled)
        with pytest.raises(BadAdapter, match="theirs: cannot be read: "):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "NONE"}')
    with pytest.raises(BadAdapter, match="theirs: cannot be read: "):
        read_adapter(folder)


def test_the_hash_is_the_checkpoints(scored_run: Path) -> None:
    found = complete_checkpoints(scored_run)
    ahead = ReadAhead([checkpoint.path for checkpoint in found], pinned=False)
    for checkpoint in found:
        assert ahead.take(checkpoint.path).sha256 == checkpoint.sha256
    ahead.close()


def test_one_bad_adapter_holds_up_no_other(scored_run: Path, tmp_path: Path) -> None:
    folders = [scored_run / "checkpoint-4", tmp_path, scored_run / "checkpoint-8"]
    ahead = ReadAhead(folders, pinned=False)
    assert ahead.take(folders[0]).folder == folders[0]
    with pytest.raises(BadAdapter):
        ahead.take(folders[1])
    assert ahead.take(folders[2]).folder == folders[2]
    ahead.close()


def entries_of(run: Path) -> dict[str, dict]:
    results = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))
    return {entry["checkpoint"] or "base": entry for entry in results["entries"]}


def test_an_adapter_overwritten_while_a_sweep_runs_is_never_scored_as_the_one_before(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(scored_run, tmp_path / "run")
    before = entries_of(run)
    shutil.rmtree(run / "eval")
    one, other = (run / name / "adapter_model.safetensors" for name in ("checkpoint-8", "checkpoint-12"))
    old = one.read_bytes()

    def overwrite(folder: Path, *, pinned: bool) -> AdapterFiles:
        if folder == run / "checkpoint-8":  # its hash has been taken for the key; the size stays
            one.write_bytes(other.read_bytes())
        return read_adapter(folder, pinned=pinned)

    monkeypatch.setattr("hw3.modeling.adapter_io.read_adapter", overwrite)
    assert main(["eval", str(run)]) == 0
    assert "checkpoint-8: its weights are not those that were hashed" in capsys.readouterr().out
    scored = entries_of(run)
    assert scored.keys() == {"base", "checkpoint-4", "checkpoint-12"}
    # Put back, it is scored, and as it was.
    monkeypatch.undo()
    one.write_bytes(old)
    assert main(["eval", str(run)]) == 0
    for name, entry in entries_of(run).items():
        assert entry["key"] == before[name]["key"]
        assert entry["mean_perplexity"] == before[name]["mean_perplexity"]


def test_an_adapter_overwritten_after_it_was_read_changes_no_score(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(scored_run, tmp_path / "run")
    before = entries_of(run)
    shutil.rmtree(run / "eval")
    score_rows = scorer.score_rows

    def spoil(*arguments: object, **options: object) -> object:
        for folder in run.glob("checkpoint-*"):
            if folder in read:
                (folder / "adapter_model.safetensors").write_bytes(b"overwritten")
        return score_rows(*arguments, **options)

    read: set[Path] = set()

    def watched(folder: Path, *, pinned: bool) -> AdapterFiles:
        files = read_adapter(folder, pinned=pinned)
        read.add(folder)
        return files

    monkeypatch.setattr("hw3.modeling.adapter_io.read_adapter", watched)
    monkeypatch.setattr("hw3.evaluation.scorer.score_rows", spoil)
    assert main(["eval", str(run)]) == 0
    assert {name: entry["mean_perplexity"] for name, entry in entries_of(run).items()} == {
        name: entry["mean_perplexity"] for name, entry in before.items()
    }


def test_full_weights_written_to_since_are_left_out(
    mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hw3.config.recipe import load_recipe

    run = tmp_path / "full"
    train(load_recipe(mini_recipe, ["lora=null", "quantization=null", "training.max_steps=8"]), run)
    first, second = (checkpoint.path / "model.safetensors" for checkpoint in complete_checkpoints(run))
    first.write_bytes(second.read_bytes())
    assert main(["eval", str(run)]) == 0
    assert "checkpoint-4: its weights are not those that were hashed" in capsys.readouterr().out
    assert entries_of(run).keys() == {"base", "checkpoint-8"}
