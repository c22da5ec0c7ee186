"""The builder of the embedded base model, on a made-up corpus: encoding, documents, and three training steps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from base_model.documents import NO_LOSS, build_epoch
from base_model.encoding import (
    EncodedCorpus,
    encode_corpus,
    is_held_out,
    load_encoded_corpus,
    read_training_pairs,
)
from base_model.layouts import DIRECTED_LABELS, FORMS
from base_model.model_card import write_model_card
from base_model.muon import orthogonalize
from base_model.network import build_model, document_mask, round_to_nf4
from base_model.scoring import held_out_loss
from base_model.settings import BOS, EOS, QUOTES, TrainingSettings
from base_model.training import learning_rate_factor, train_quotes
from base_model.vocabulary import build_vocabulary, encode_characters
from build_base import main
from helpers import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

SURNAMES = "赵钱孙李周吴郑王冯陈"
PLACES = "京洛晋楚齐鲁燕秦蜀越"
DEEDS = [
    ("出{}门", "从{}的城门出去"),
    ("还{}里", "回到{}的故乡"),
    ("入{}宫", "进入{}的宫殿"),
    ("守{}边", "守卫{}的边境"),
]
SMALL_SETTINGS = {"rows": 2, "length": 64, "width": 64, "layers": 2, "heads": 1, "mlp": 128, "warmup": 1}


def corpus_lines() -> list[str]:
    speech = [f"书\t{name}氏曰：{place}远。\t姓{name}的人说：{place}很遥远。" for name in SURNAMES for place in PLACES]
    return speech + [
        f"书\t{name}氏{classical.format(place)}。\t姓{name}的人{modern.format(place)}了。"
        for name in SURNAMES
        for place in PLACES
        for classical, modern in DEEDS
    ]


def write_corpus(folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    middle = len(lines) // 2
    for number, part in enumerate((lines[:middle], lines[middle:])):
        (folder / f"pairs-{number}.tsv.xz").write_bytes(lzma.compress("".join(f"{line}\n" for line in part).encode()))
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    encode_corpus(write_corpus(folder / "corpus", corpus_lines()), folder / "encoded")
    return folder / "encoded"


def test_build_vocabulary_orders_by_count_then_code_point() -> None:
    text = "乙" * 20 + "甲" * 20 + "丁" * 30 + "戊" * 14
    vocabulary = build_vocabulary([text], {"丙", "丁"})
    assert vocabulary == ["<pad>", "<eos>", "<bos>", "<unk>", "丁", "乙", "甲", "丙", *"「」『』“”"]
    assert encode_characters("甲乙丙丁戊𠮷", vocabulary).tolist() == [6, 5, 7, 4, 3, 3]


def test_encode_corpus_writes_the_converted_pairs(encoded: Path) -> None:
    with np.load(encoded / "pairs.npz") as arrays:
        ids, lengths, held_out = arrays["ids"], arrays["lengths"], arrays["held_out"]
    vocabulary = json.loads((encoded / "vocabulary.json").read_text(encoding="utf-8"))
    first = "".join(vocabulary[i] for i in ids[: lengths[0].sum()])
    assert first == "趙氏曰：京遠。" + "姓趙的人說：京很遙遠。"
    assert len(lengths) == len(held_out) == 500
    assert len(ids) == lengths.sum()
    assert 0 < held_out.sum() < 20
    summary = json.loads((encoded / "encoding.json").read_text(encoding="utf-8"))
    assert summary["unknown_characters"] == 0
    assert set("下面麵齣答案：\n") <= set(vocabulary)


def test_read_training_pairs_reads_the_text_that_the_committed_model_was_trained_on(tmp_path: Path) -> None:
    """The hash was computed with the reader that this tool had before it used `hw3.corpus`."""
    lines = [*corpus_lines(), "书\t里后云：干了。\t 他在发里面说 ，云后乾隆出发了？", f"书\t长\t{'长' * 500}"]
    pairs, held_out, _ = read_training_pairs(write_corpus(tmp_path / "corpus", lines))
    text = "".join(f"{a}\t{b}\t{int(held)}\n" for (a, b), held in zip(pairs, held_out, strict=True))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert (len(pairs), digest) == (501, "1f54919b94828538687207d68489ae0063c5697181331e9bfaea7765b437c183")


def test_held_out_pairs_do_not_depend_on_the_order_of_the_corpus(tmp_path: Path) -> None:
    lines = corpus_lines()
    shuffled = random.Random(1).sample(lines, len(lines))
    splits = []
    for name, order in (("a", lines), ("b", shuffled)):
        pairs, held_out, _ = read_training_pairs(write_corpus(tmp_path / name, order))
        splits.append({pair for pair, held in zip(pairs, held_out, strict=True) if held})
        assert not splits[-1] & {pair for pair, held in zip(pairs, held_out, strict=True) if not held}
    assert splits[0] == splits[1]


def test_read_training_pairs_drops_a_training_pair_with_a_held_out_modern_text(tmp_path: Path) -> None:
    held = next(line for line in corpus_lines() if is_held_out(line.split("\t")[1]))
    seen = next(line for line in corpus_lines() if not is_held_out(line.split("\t")[1])).split("\t")[1]
    lines = [held, f"书\t{seen}\t{held.split(chr(9))[2]}", f"书\t{seen}\t别的译文。", f"书\t{seen}\t{'长' * 500}"]
    pairs, held_out, _ = read_training_pairs(write_corpus(tmp_path / "corpus", lines))
    assert held_out == [True, False]
    assert pairs[1][1] == "別的譯文。"


@pytest.mark.parametrize("content", [None, "一\t二\n"])
def test_encode_exits_with_2_for_a_corpus_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: str
) -> None:
    if content:
        (tmp_path / "a.tsv.xz").write_bytes(lzma.compress(content.encode()))
    assert main(["encode", "--corpus", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def read_documents(corpus: EncodedCorpus, settings: TrainingSettings, seed: int = 0) -> list[tuple[str, str]]:
    """Return the complete documents of an epoch: text, and one letter per token for its kind (n, i, o)."""
    tokens, kinds = build_epoch(corpus, settings, torch.Generator().manual_seed(seed))
    documents = []
    for row, row_kinds in zip(tokens.tolist(), kinds.tolist(), strict=True):
        start = None
        for at, token in enumerate(row):
            if token == BOS:
                start = at
            if token == EOS and start is not None:
                text = "".join(corpus.vocabulary[i] for i in row[start + 1 : at])
                documents.append((text, "".join("nio"[kind] for kind in row_kinds[start : at + 1])))
                start = None
    return documents


def all_pairs(corpus: EncodedCorpus) -> list[tuple[str, str]]:
    text = "".join(corpus.vocabulary[i] for i in corpus.ids.tolist())
    pairs, at = [], 0
    for classical, modern in corpus.lengths.tolist():
        pairs.append((text[at : at + classical], text[at + classical : at + classical + modern]))
        at += classical + modern
    return pairs


def test_build_epoch_writes_one_pair_in_its_layout(encoded: Path) -> None:
    corpus = load_encoded_corpus(encoded, "cpu", held_out=False)
    expected = {}
    for classical, modern in all_pairs(corpus):
        for input_text, output_text, swapped in ((classical, modern, False), (modern, classical, True)):
            for before, after, line_break, _ in FORMS:
                for labels in DIRECTED_LABELS:
                    a, b = labels[::-1] if swapped else labels
                    head, between = f"{before}{a}{after}", f"{line_break}{before}{b}{after}"
                    kinds = "n" * (1 + len(head)) + "i" * len(input_text)
                    kinds += "n" * len(between) + "o" * (len(output_text) + 1)
                    expected[f"{head}{input_text}{between}{output_text}"] = kinds
    settings = TrainingSettings(**SMALL_SETTINGS, single=1.0, styles=(0.0, 1.0, 0.0, 0.0), one_to_one=0.0)
    documents = read_documents(corpus, settings)
    assert len(documents) > 100
    for text, kinds in documents:
        assert expected[text] == kinds


def test_build_epoch_keeps_neighbouring_pairs_in_one_direction(encoded: Path) -> None:
    corpus = load_encoded_corpus(encoded, "cpu", held_out=False)
    pairs = all_pairs(corpus)
    settings = TrainingSettings(
        **{**SMALL_SETTINGS, "length": 256}, single=0.0, mixed=0.0, styles=(1.0, 0.0, 0.0, 0.0), one_to_one=0.0
    )
    documents = read_documents(corpus, settings)
    classical = {pair[0] for pair in pairs}
    sizes = set()
    for text, kinds in documents:
        lines = text.replace("\n\n", "\n").split("\n")
        sizes.add(len(lines) // 2)
        side = 0 if lines[0] in classical else 1
        first = [pair[side] for pair in pairs].index(lines[0])
        run = pairs[first : first + len(lines) // 2]
        assert lines == [text for pair in run for text in (pair[side], pair[1 - side])]
        assert kinds.endswith("o")  # EOS is learned
    assert min(sizes) >= 2 and max(sizes) <= 8 and len(sizes) > 4


def test_build_epoch_quotes_speech_only_if_requested(encoded: Path) -> None:
    corpus = load_encoded_corpus(encoded, "cpu", held_out=False)
    settings = TrainingSettings(**SMALL_SETTINGS, styles=(1.0, 0.0, 0.0, 0.0), one_to_one=0.0)
    for quoted in (False, True):
        tokens, _ = build_epoch(corpus, settings, torch.Generator().manual_seed(0), quoted)
        text = "".join(corpus.vocabulary[i] for i in tokens.flatten().tolist())
        assert bool(re.search("氏曰：「.遠。」", text)) == bool(re.search("人說：『.很遙遠。』", text)) == quoted
        assert bool(re.search("曰：[^「『“]", text)) != quoted


def test_train_quotes_changes_only_their_embeddings(encoded: Path) -> None:
    corpus = load_encoded_corpus(encoded, "cpu", held_out=False)
    settings = TrainingSettings(**SMALL_SETTINGS, quote_steps=2)
    model = build_model(len(corpus.vocabulary), settings)
    model.set_attn_implementation("eager")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_quotes(model, corpus, settings)
    for name, value in model.state_dict().items():
        changed = (value != before[name]).reshape(len(value), -1).any(1).nonzero().flatten().tolist()
        expected = sorted(corpus.encode("".join(QUOTES))) if "embed" in name or "lm_head" in name else []
        assert changed == expected, name


def test_build_epoch_spells_one_to_one_documents_with_the_map(encoded: Path) -> None:
    corpus = load_encoded_corpus(encoded, "cpu", held_out=False)
    texts = {
        share: "".join(t for t, _ in read_documents(corpus, TrainingSettings(**SMALL_SETTINGS, one_to_one=share)))
        for share in (0.0, 1.0)
    }
    assert "出" in texts[0.0] and "齣" not in texts[0.0]
    assert "齣" in texts[1.0] and "出" not in texts[1.0]


def test_build_epoch_gives_a_cut_pair_no_loss_in_the_next_row(encoded: Path) -> None:
    corpus = load_encoded_corpus(encoded, "cpu", held_out=False)
    settings = TrainingSettings(**{**SMALL_SETTINGS, "length": 128}, single=1.0, styles=(0.3, 0.4, 0.3, 0.0))
    tokens, kinds = build_epoch(corpus, settings, torch.Generator().manual_seed(0))
    cut = 0
    for row, row_kinds in zip(tokens.tolist(), kinds.tolist(), strict=True):
        start = row.index(BOS)
        assert set(row_kinds[:start]) <= {NO_LOSS}
        cut += start > 0
    assert cut > 10


def test_build_epoch_draws_new_documents_each_time_and_the_same_for_a_seed(encoded: Path) -> None:
    corpus = load_encoded_corpus(encoded, "cpu", held_out=False)
    settings = TrainingSettings(**SMALL_SETTINGS)
    generator = torch.Generator().manual_seed(3)
    first, second = (build_epoch(corpus, settings, generator)[0] for _ in range(2))
    again = build_epoch(corpus, settings, torch.Generator().manual_seed(3))[0]
    assert torch.equal(first, again)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_document_mask_hides_other_documents() -> None:
    mask = document_mask(torch.tensor([[2, 5, 1, 2, 6]]), compiled=False)[0, 0]
    assert (mask == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_round_to_nf4_matches_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    assert torch.allclose(round_to_nf4(weights), functional.dequantize_4bit(packed, state), atol=1e-6)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert values.min() > 0.5 and values.max() < 1.5


def test_learning_rate_factor_rises_stays_and_falls_to_zero() -> None:
    settings = TrainingSettings(steps=100, warmup=10, decay=0.5)
    factors = [learning_rate_factor(step, settings) for step in (0, 9, 50, 75, 99)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])


def test_train_saves_a_model_that_loads_and_is_reproducible_by_seed(encoded: Path, tmp_path: Path) -> None:
    records = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        changes = [
            f"{key}={value}"
            for key, value in {**SMALL_SETTINGS, "steps": 3, "nf4": 0.4, "quote_steps": 2, "seed": seed}.items()
        ]
        command = ["train", "--encoded", str(encoded), "--output", str(tmp_path / name), "--set", *changes]
        assert main(command) == 0
        records.append(json.loads((tmp_path / name / "training.json").read_text(encoding="utf-8")))
    assert records[0]["held_out_loss"] == records[1]["held_out_loss"] != records[2]["held_out_loss"]
    assert records[0]["training_loss"][-1]["loss"] == records[1]["training_loss"][-1]["loss"]
    assert set(records[0]["held_out_loss"]) == {
        f"{direction}_{shots}" for direction in ("classical_to_modern", "modern_to_classical") for shots in (0, 4)
    }

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.bfloat16 and model.config.model_type == "gemma2"
    assert len(tokenizer) <= model.config.vocab_size
    corpus = load_encoded_corpus(encoded, "cpu", held_out=True)
    losses = held_out_loss(model.float(), corpus)
    assert losses == pytest.approx(records[0]["held_out_loss_saved"], rel=1e-5)
    assert (tmp_path / "a" / "README.md").read_text(encoding="utf-8").count("the saved model") == 2


def test_train_exits_with_2_for_a_wrong_setting(encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for change, message in (("stepps=3", "no such setting"), ("steps=many", "not a value of type int")):
        assert main(["train", "--encoded", str(encoded), "--output", str(tmp_path), "--set", change]) == 2
        assert message in capsys.readouterr().err


def test_committed_base_model_has_the_documented_tokens_and_size() -> None:
    folder = REPOSITORY / "data" / "tiny"
    assert (folder / "model.safetensors").stat().st_size <= 14_000_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    for name, value in ids.items():
        assert (
            getattr(tokenizer, name) == getattr(model.config, name) == getattr(model.generation_config, name) == value
        )
    assert tokenizer.unk_token_id == 3
    text = "你是一位 語言轉換助理，\n\n將下麵句子翻譯成文言文：\nUSER：ASSISTANT  下面。\n"
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert len(encoded) == len(text) and tokenizer.decode(encoded) == text
    assert tokenizer.encode("天") == [2, *tokenizer.encode("天", add_special_tokens=False)]
    for name in ("train", "eval"):
        for row in json.loads((REPOSITORY / f"data/{name}.json").read_text(encoding="utf-8")):
            assert 3 not in tokenizer.encode(row["instruction"] + row["output"], add_special_tokens=False)
    inputs = {linear.in_features for linear in model.modules() if isinstance(linear, torch.nn.Linear)}
    assert all(size % 64 == 0 for size in inputs)


def test_committed_model_card_matches_its_records(tmp_path: Path) -> None:
    folder = REPOSITORY / "data" / "tiny"
    (tmp_path / "training.json").write_bytes((folder / "training.json").read_bytes())
    write_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    again = json.loads((REPOSITORY / "docs/base/second_run.json").read_text(encoding="utf-8"))
    assert record["settings"] == json.loads(json.dumps(dataclasses.asdict(TrainingSettings())))
    assert again["settings"] == {**record["settings"], "quote_steps": 0}  # scored before that phase
    for name, loss in record["held_out_loss"].items():
        assert again["held_out_loss"][name] == pytest.approx(loss, abs=0.01)
