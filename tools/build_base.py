"""Build the small base model in `data/tiny`: encode a corpus of sentence pairs, then train on one GPU.

    python tools/build_base.py encode --corpus NIUTRANS --out scratch/encoded   # CPU, needs OpenCC
    python tools/build_base.py train --encoded scratch/encoded --out data/tiny  # one GPU
    python tools/build_base.py build --corpus NIUTRANS --out data/tiny          # both
    python tools/build_base.py card --out data/tiny                             # the model card again, from the records

The corpus is a folder of `*.tsv.xz` files with lines `book<TAB>classical<TAB>modern` in simplified characters, such as
NiuTrans/Classical-Modern. One token is one character. A training document is one to eight neighbouring pairs in one
plain layout, so that the pairs before a question show the model what is asked, and it ends with EOS.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hw3.common.errors import UserError
from hw3.corpus.niutrans import read_parts
from hw3.corpus.script_conversion import converter

REPOSITORY = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
PAD, EOS, BOS, UNK = range(4)
HEAD_DIM = 64  # also the block size of NF4, so no block crosses a row of a weight matrix
MIN_COUNT = 15  # a rarer character becomes <unk> unless it is required
MAX_PAIR = 500  # characters of both sides; the few longer pairs are whole chapters
NO_LOSS, INPUT, ANSWER = range(3)  # kinds of a training token
QUOTES = ["「」", "『』", "“”"]  # the corpus as published has none; the title marks 《》 are the nearest thing it has

# Characters that a prompt of this project may hold: the study's and the course's prompts, the templates of the
# homework in both spellings of 下面, and the four worked examples.
PROMPT_TEXT = """
你是一位語言轉換助理，能夠根據用戶的輸入，自動判斷句子是白話文還是文言文、並且進行互譯。
無論用戶提供的是白話文還是文言文，你都要進行正確的轉換並給出簡潔的翻譯。
你是人工智慧助理，以下是用戶和人工智能助理之間的對話。你要對用戶的問題提供有用、安全、詳細和禮貌的回答。
翻譯成文言文：幫我把這句話翻譯成文言文 將下麵句子翻譯成文言文：將下面句子翻譯成現代文：答案：
這句話在古代怎麼說：這句話在中國古代怎麼說：翻譯成古文：翻譯成現代文。翻譯成白話文：文言文翻譯：
沒過十天，鮑泉果然被拘捕。後未旬，果見囚執。辛未，命吳堅為左丞相兼樞密使，常楙參知政事。
初五，命令吳堅為左承相兼樞密使，常增為參知政事。明日，趙用賢疏入。第二天，趙用賢的疏奏上。
州民鄭五醜構逆，與叛羌傍乞鐵匆相應，令剛往鎮之。渭州人鄭五醜造反，與叛逆羌傍乞鐵忽互相呼應。下令趟剛前往鎮壓。
""" + "".join(map(chr, range(0x20, 0x7F)))

# Proper character, then the one that a one-to-one map from simplified characters (hanziconv 0.3.2) writes for it.
ONE_TO_ONE = (
    "了瞭出齣鑑鑒家傢回迴千韆向嚮才纔面麵裡裏里裏制製合閤志誌后後御禦只隻別彆表錶秋鞦寧寜臺颱致緻朱硃"
    "胡鬍冬鼕谷榖征徵克剋歷曆舍捨曲麯佔占產産顏顔幹乾于於丑醜採采蒙濛累纍困睏勳勛沈瀋諡謚折摺啟啓佈布"
    "卜蔔卷捲巖岩併並讚贊偽僞松鬆兇凶穀榖託托恆恒獎奬髮發咸鹹借藉閒閑錫锡云雲范範系係干乾鐘鍾洩泄饑飢"
    "游遊斗鬥旋鏇姜薑諮谘幷並慾欲凌淩板闆繫係准準冢塚溼濕鉅巨繡綉複復豎竪臟髒線綫倖幸鉤鈎岳嶽愍湣週周"
    "弔吊籤簽齎賫辟闢弒弑昇升釐厘余餘札劄呵嗬燬毀沖衝儘盡脩修症癥註注譭毀歎嘆癒愈豔艷缽鉢蹟跡灶竈崑昆"
    "党黨台颱稜棱几幾卹恤氾泛盪蕩鬚須矇濛冑胄刮颳釒钅穫獲纖縴珏玨譁嘩崙侖姦奸彙匯蔑衊糹糸餚肴坂阪絃弦"
    "僱雇悽淒蒐搜谿溪瀘濾慄栗唸念嚐嘗譟噪扎紮餵喂沓遝万萬慼戚闇暗剷鏟麴麯逕徑齧嚙朴樸磾䃅痴癡燻熏愨慤"
    "蝨虱蓆席彿佛郁鬱廕蔭吶呐鐫鎸杰傑韁繮扞捍璇璿藁槁孃娘朮術尸屍曏嚮滷鹵郄郤瀰彌捱挨仆僕襁繈鍊煉罈壇"
    "柺拐鹼堿綵彩鋮铖种種剎刹珉瑉鳧鳬伙夥跖蹠霑沾輓挽牴抵鱷鰐檯颱壎塤"
)

# A layout writes a pair as: before, label, after, text, break, label, after, answer; then the separator or EOS.
DIRECTED_LABELS = [  # of a classical and of a modern text
    ("文言文", "白話文"),
    ("文言", "白話"),
    ("古文", "今譯"),
    ("古文", "現代漢語"),
    ("文言文", "現代漢語"),
    ("古", "今"),
    ("文言", "語體"),
    ("古語", "今語"),
]
PLAIN_LABELS = [  # of a text and of its answer, whatever the direction
    ("原文", "譯文"),
    ("輸入", "輸出"),
    ("問", "答"),
    ("甲", "乙"),
    ("句", "譯"),
    ("題", "解"),
    ("Q", "A"),
    ("原句", "改寫"),
]
FORMS = [  # before, after, break, separator
    ("", "：", "\n", "\n"),
    ("", "：", "\n", "\n\n"),
    ("", "：\n", "\n", "\n\n"),
    ("【", "】", "\n", "\n"),
    ("", ": ", "\n", "\n"),
]
BARE_FORMS = [("", "", "\n", "\n"), ("", "", "\n", "\n\n")]
BARE, DIRECTED, PLAIN, RANDOM = range(4)  # styles of label


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the weights, beside the corpus."""

    seed: int = 0
    steps: int = 16000
    rows: int = 64  # a step's rows
    length: int = 1024  # tokens in a row; documents are packed and see only themselves
    width: int = 256
    layers: int = 7
    heads: int = 4
    kv_heads: int = 1
    mlp: int = 576
    optimizer: str = "muon"  # for the matrices of the layers; the rest always gets AdamW
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    warmup: int = 200  # steps
    decay: float = 0.6  # share of the steps, at the end, over which the learning rate falls to 0
    average: float = 0.998  # of the weights over the steps, exponential; 0 keeps the last ones
    input_weight: float = 0.3  # of a text's own tokens in the loss; its answer has 1
    single: float = 0.35  # share of documents with one pair; the others have two to eight
    mixed: float = 0.2  # share of documents whose pairs go in either direction
    styles: tuple[float, ...] = (0.15, 0.35, 0.25, 0.25)  # bare, directed, plain, random labels
    one_to_one: float = 0.1  # share of documents spelled by the one-to-one map
    nf4: float = 0.15  # share of the steps, at the end, that see their matrices rounded to NF4
    quote_steps: int = 300  # after all that: steps that teach quotation marks, and change nothing else


# ---------------------------------------------------------------------------------------------- corpus to ids


def is_held_out(classical: str) -> bool:
    """Whether a pair is held out: one in 200, by the SHA-256 of its classical text as published."""
    return int.from_bytes(hashlib.sha256(classical.encode()).digest()[:8], "big") % 200 == 0


def read_corpus(folder: Path) -> tuple[list[tuple[str, str]], list[bool], str]:
    """Read every `*.tsv.xz` of `folder`: pairs in Taiwan's characters, which are held out, sha256 of the files.

    A pair that is not held out, but whose modern text is that of a held-out pair, is left out; so is one longer than
    `MAX_PAIR` characters. Raises UserError if there is no such file or a line has not three fields.
    """
    corpus = read_parts(folder)
    published = corpus.pairs
    convert = converter("s2tw")
    pairs = list(
        zip(*(convert([getattr(pair, side) for pair in published]) for side in ("classical", "modern")), strict=True)
    )
    held_out = [is_held_out(classical) for _, classical, _ in published]
    hidden = {modern for (_, _, modern), held in zip(published, held_out, strict=True) if held}
    keep = [
        len(classical) + len(modern) <= MAX_PAIR and (held or modern not in hidden)
        for (_, classical, modern), held in zip(published, held_out, strict=True)
    ]
    kept_pairs = [pair for pair, kept in zip(pairs, keep, strict=True) if kept]
    return kept_pairs, [held for held, kept in zip(held_out, keep, strict=True) if kept], corpus.sha256


def required_characters() -> set[str]:
    """Every character of the sample data and of the prompts."""
    text = PROMPT_TEXT + "".join(before + after for before, after in zip(*[iter(ONE_TO_ONE)] * 2, strict=True))
    text += "".join(a + b for a, b in DIRECTED_LABELS + PLAIN_LABELS) + "".join(map("".join, FORMS))
    sample = [*sorted((REPOSITORY / "data/pairs").glob("*.tsv"))]
    sample += [REPOSITORY / "data/train.json", REPOSITORY / "data/eval.json"]
    for file in sample:
        if file.is_file():
            text += file.read_text(encoding="utf-8")
    return set(text) - {"\t", "\r"}


def build_vocabulary(texts: Iterable[str], required: set[str]) -> list[str]:
    """Special tokens, characters by falling count (equal ones by code point), quotation marks that are not yet there.

    A character with fewer than `MIN_COUNT` is left out unless it is required.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    chosen = {character for character, count in counts.items() if count >= MIN_COUNT} | required
    marks = [mark for mark in "".join(QUOTES) if mark not in chosen]
    return SPECIAL_TOKENS + sorted(chosen, key=lambda character: (-counts[character], character)) + marks


def to_ids(text: str, vocabulary: list[str]) -> np.ndarray:
    """One id a character, uint16; `<unk>` where the vocabulary has no such character."""
    table = np.full(0x110000, UNK, dtype=np.uint16)
    for token_id, token in enumerate(vocabulary[len(SPECIAL_TOKENS) :], len(SPECIAL_TOKENS)):
        table[ord(token)] = token_id
    return table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]


def encode(corpus: Path, out: Path) -> None:
    """Write `pairs.npz`, `vocabulary.json` and `encoding.json` (what was read) for the pairs of `corpus` to `out`.

    `pairs.npz` holds `ids` (every pair's classical text, then its modern one, end to end), `lengths` (pairs, 2),
    `held_out` (pairs) and `one_to_one` (vocabulary: the id of each token in that spelling).
    """
    pairs, held_out, digest = read_corpus(corpus)
    vocabulary = build_vocabulary((text for pair in pairs for text in pair), required_characters())
    ids = to_ids("".join(text for pair in pairs for text in pair), vocabulary)
    one_to_one = np.arange(len(vocabulary), dtype=np.uint16)
    for proper, other in zip(*[iter(ONE_TO_ONE)] * 2, strict=True):
        one_to_one[vocabulary.index(proper)] = vocabulary.index(other)
    out.mkdir(parents=True, exist_ok=True)
    lengths = np.array([(len(classical), len(modern)) for classical, modern in pairs], dtype=np.uint16)
    np.savez(out / "pairs.npz", ids=ids, lengths=lengths, held_out=np.array(held_out), one_to_one=one_to_one)
    summary = {
        "corpus_sha256": digest,
        "pairs": len(pairs),
        "held_out_pairs": sum(held_out),
        "characters": len(ids),
        "unknown_characters": int((ids == UNK).sum()),
        "vocabulary": len(vocabulary),
        "pairs_sha256": hashlib.sha256(ids.tobytes() + lengths.tobytes()).hexdigest(),
    }
    (out / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (out / "encoding.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Encoded pairs on one device: `ids` (characters,), `lengths` (pairs, 2), both int64 but `ids` int32."""

    ids: Tensor
    lengths: Tensor
    one_to_one: Tensor
    vocabulary: list[str]
    summary: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        return [int(token_id) for token_id in to_ids(text, self.vocabulary)]


def load_corpus(folder: Path, device: str, held_out: bool) -> Corpus:
    """The training pairs of an encoded folder, or the held-out ones. Raises UserError if there are none."""
    if not (folder / "pairs.npz").is_file():
        raise UserError(f"{folder}: no pairs.npz there; run the encode command first")
    with np.load(folder / "pairs.npz") as arrays:
        lengths = arrays["lengths"].astype(np.int64)
        wanted = arrays["held_out"] == held_out
        ids = arrays["ids"][np.repeat(wanted, lengths.sum(1))]
        one_to_one = arrays["one_to_one"].astype(np.int32)
    if not wanted.any():
        raise UserError(f"{folder}: no {'held-out' if held_out else 'training'} pair")
    return Corpus(
        torch.from_numpy(ids.astype(np.int32)).to(device),
        torch.from_numpy(lengths[wanted]).to(device),
        torch.from_numpy(one_to_one).to(device),
        json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")),
        json.loads((folder / "encoding.json").read_text(encoding="utf-8")),
    )


# -------------------------------------------------------------------------------------------------- documents


def draw_documents(pairs: int, settings: Settings, random: torch.Generator) -> dict[str, Tensor]:
    """One epoch's documents: neighbouring pairs in random groups, in random order.

    Returns tensors with one value a pair, in reading order: `pair` (index), `first` and `last` in its document, `swap`
    (the modern text is the question), and the document's `style`, `label`, `form`, `one_to_one`, `preamble`, `fill`.
    """

    def share(size: int, probability: float) -> Tensor:
        return torch.rand(size, generator=random) < probability

    def pick(size: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=random)

    sizes = torch.where(share(pairs, settings.single), 1, pick(pairs, 2, 9))
    ends = sizes.cumsum(0)
    count = int((ends < pairs).sum()) + 1
    sizes, ends = sizes[:count], ends[:count].clamp(max=pairs)
    sizes[-1] = pairs - (ends[-2] if count > 1 else 0)
    starts = ends - sizes
    order = torch.randperm(count, generator=random)
    style = torch.multinomial(torch.tensor(settings.styles), count, replacement=True, generator=random)
    document = {
        "swap": share(count, 0.5),
        "mixed": share(count, settings.mixed),
        "style": style,
        "label": pick(count, 0, 2**30),
        "form": pick(count, 0, 2**30),
        "one_to_one": share(count, settings.one_to_one),
        "preamble": (style == RANDOM) & share(count, 0.5),
        "fill": torch.where(style == RANDOM, pick(count, 0, 3), 0),  # none, before the text, after it
    }
    sizes = sizes[order]
    of = torch.repeat_interleave(sizes)  # the document of each pair
    first_at = sizes.cumsum(0) - sizes
    place = torch.arange(pairs) - first_at[of]
    drawn = {name: value[of] for name, value in document.items()}
    drawn["swap"] = torch.where(drawn.pop("mixed"), share(pairs, 0.5), drawn["swap"])
    drawn["pair"] = starts[order][of] + place
    drawn["first"], drawn["last"] = place == 0, place == sizes[of] - 1
    drawn["document"] = of
    return drawn


def find_speech(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Where speech begins, after the first colon: offsets (pairs, 2); and whether both sides have a colon (pairs,)."""
    lengths = corpus.lengths.flatten()
    ends = lengths.cumsum(0)
    colons = (corpus.ids == corpus.encode("：")[0]).nonzero().flatten()
    side = torch.searchsorted(ends, colons, right=True)
    first = torch.full_like(ends, 2**40).scatter_reduce(0, side, colons, "amin")
    offset = first + 1 - (ends - lengths)
    return offset.view(-1, 2), (offset < lengths).view(-1, 2).all(1)


def build_epoch(
    corpus: Corpus, settings: Settings, random: torch.Generator, quoted: bool = False
) -> tuple[Tensor, Tensor]:
    """Lay out one epoch: tokens int32 and kinds uint8, both (rows, length); the last row that is not full is dropped.

    Every document is BOS, its pairs, EOS. With `quoted`, speech after a colon stands in quotation marks. A pair cut by
    the end of a row has no loss in the next row, where its text cannot be seen. `random` is a CPU generator, so that
    every device draws the same documents.
    """
    device = corpus.ids.device
    pairs = len(corpus.lengths)
    drawn = {name: value.to(device) for name, value in draw_documents(pairs, settings, random).items()}

    # Literal pieces stand behind the corpus in one pool; a piece of a document is then (start, length) in that pool.
    pool: list[int] = []
    spans: dict[str, tuple[int, int]] = {}

    def span(text: str) -> tuple[int, int]:
        if text not in spans:
            tokens = {"<bos>": [BOS], "<eos>": [EOS]}.get(text) or corpus.encode(text)
            spans[text] = (len(corpus.ids) + len(pool), len(tokens))
            pool.extend(tokens)
        return spans[text]

    def table(texts: Iterable[str]) -> Tensor:
        return torch.tensor([span(text) for text in texts], device=device)

    label_table = table(text for pair in [("", ""), *DIRECTED_LABELS, *PLAIN_LABELS] for text in pair).view(-1, 2, 2)
    form_table = table(text for form in [*BARE_FORMS, *FORMS] for text in form).view(-1, 4, 2)
    bos, eos, newline, nothing = table(["<bos>", "<eos>", "\n", ""])
    quotes = table(mark for pair in QUOTES for mark in pair).view(-1, 2, 2)
    source = torch.cat([corpus.ids, torch.tensor(pool, dtype=torch.int32, device=device)])

    def fragment(size: int, low: int, high: int) -> Tensor:
        """(start, length) of `size` random stretches of the corpus, of `low` to `high - 1` characters."""
        start = torch.randint(0, max(1, len(corpus.ids) - high), (size,), generator=random)
        length = torch.randint(low, high, (size,), generator=random).clamp(max=len(corpus.ids))
        return torch.stack([start, length], 1).to(device)

    def where(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
        return torch.where(condition[:, None], chosen, other)

    style, document, swap = drawn["style"], drawn["document"], drawn["swap"].long()
    label = torch.zeros_like(style)
    label = torch.where(style == DIRECTED, 1 + drawn["label"] % len(DIRECTED_LABELS), label)
    label = torch.where(style == PLAIN, 1 + len(DIRECTED_LABELS) + drawn["label"] % len(PLAIN_LABELS), label)
    form = torch.where(style == BARE, drawn["form"] % len(BARE_FORMS), len(BARE_FORMS) + drawn["form"] % len(FORMS))
    form = form_table[form]
    question_side = torch.where(style == DIRECTED, swap, 0)
    labels = label_table[label, question_side], label_table[label, 1 - question_side]
    documents = int(document[-1]) + 1
    random_labels = fragment(documents, 1, 7)[document], fragment(documents, 1, 7)[document]
    labels = [
        where(style == RANDOM, drawn_at_random, fixed)
        for drawn_at_random, fixed in zip(random_labels, labels, strict=True)
    ]

    ends = corpus.lengths.sum(1).cumsum(0)
    start = (ends - corpus.lengths.sum(1))[drawn["pair"]]
    lengths = corpus.lengths[drawn["pair"]]
    sides = [torch.stack([start, lengths[:, 0]], 1), torch.stack([start + lengths[:, 0], lengths[:, 1]], 1)]
    if quoted:
        offset, has_speech = (found[drawn["pair"]] for found in find_speech(corpus))
        marks = quotes[(drawn["label"] % 8 - 5).clamp(min=0)]  # mostly the first, now and then the others
        written = [write_speech(side, offset[:, i], has_speech, marks, nothing) for i, side in enumerate(sides)]
    else:
        written = [[side] for side in sides]
    texts = [
        [where(drawn["swap"], modern, classical) for classical, modern in zip(*order, strict=True)]
        for order in (written, written[::-1])
    ]
    preamble = drawn["first"] & drawn["preamble"]
    fills = fragment(pairs, 3, 12)
    fill_before, fill_after = drawn["fill"] == 1, drawn["fill"] == 2
    pieces = [
        (where(drawn["first"], bos, nothing), NO_LOSS),
        (where(preamble, fragment(pairs, 10, 80), nothing), NO_LOSS),
        (where(preamble, newline, nothing), NO_LOSS),
        (form[:, 0], NO_LOSS),
        (labels[0], NO_LOSS),
        (where(style == BARE, nothing, form[:, 1]), NO_LOSS),
        (where(fill_before, fills, nothing), NO_LOSS),
        (where(fill_before, newline, nothing), NO_LOSS),
        *((text, INPUT) for text in texts[0]),
        (where(fill_after, newline, nothing), NO_LOSS),
        (where(fill_after, fills, nothing), NO_LOSS),
        (form[:, 2], NO_LOSS),
        (form[:, 0], NO_LOSS),
        (labels[1], NO_LOSS),
        (where(style == BARE, nothing, form[:, 1]), NO_LOSS),
        *((text, ANSWER) for text in texts[1]),
        (where(drawn["last"], eos, form[:, 3]), ANSWER),
    ]
    starts, sizes = torch.stack([piece for piece, _ in pieces], 1).unbind(2)  # (pairs, pieces) each
    kinds = torch.tensor([kind for _, kind in pieces], dtype=torch.uint8, device=device)
    rows = int(sizes.sum()) // settings.length
    if rows == 0:
        raise UserError(f"the corpus does not fill one row of {settings.length} tokens")

    flat = sizes.flatten()
    piece_end = flat.cumsum(0)
    piece = torch.repeat_interleave(flat)[: rows * settings.length]  # the piece of each token
    at = torch.arange(len(piece), device=device)
    tokens = source[starts.flatten()[piece] + at - (piece_end - flat)[piece]]
    pair = piece // len(pieces)
    tokens = torch.where(drawn["one_to_one"][pair], corpus.one_to_one[tokens], tokens)
    pair_start = (piece_end - flat).view(-1, len(pieces))[:, 0]
    whole = pair_start[pair] // settings.length == at // settings.length
    kind = torch.where(whole, kinds[piece % len(pieces)], NO_LOSS)
    return tokens.view(rows, -1), kind.view(rows, -1)


def write_speech(side: Tensor, offset: Tensor, has_speech: Tensor, marks: Tensor, nothing: Tensor) -> list[Tensor]:
    """One side of each pair as pieces (pairs, 2) of start and length: text, opening mark, speech, closing mark."""
    start, length = side.unbind(1)
    offset = torch.where(has_speech, offset, length)
    opening, closing = (torch.where(has_speech[:, None], marks[:, i], nothing) for i in (0, 1))
    return [
        torch.stack([start, offset], 1),
        opening,
        torch.stack([start + offset, length - offset], 1),
        closing,
    ]


def batches(corpus: Corpus, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of tokens and kinds (rows, length); every epoch draws its documents anew from the seed."""
    random = torch.Generator().manual_seed(settings.seed)
    while True:
        tokens, kinds = build_epoch(corpus, settings, random)
        if len(tokens) < settings.rows:
            raise UserError(f"the corpus fills {len(tokens)} rows; a step needs {settings.rows}")
        for start in range(0, len(tokens) - settings.rows + 1, settings.rows):
            yield tokens[start : start + settings.rows], kinds[start : start + settings.rows]


# ---------------------------------------------------------------------------------------------------- weights

NF4_CODE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4_CODE += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4_CODE += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
NF4_CODE += [0.7229568362236023, 1.0]


def round_to_nf4(weights: Tensor) -> Tensor:
    """Quantize to NF4 and back, in blocks of 64 (Dettmers et al. 2023, QLoRA), without double quantization."""
    code = torch.tensor(NF4_CODE, device=weights.device)
    blocks = weights.float().reshape(-1, HEAD_DIM)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    nearest = code[torch.bucketize(blocks / scale, (code[1:] + code[:-1]) / 2)]
    return (nearest * scale).reshape(weights.shape).to(weights.dtype)


def layer_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The matrices that QLoRA quantizes: every linear layer but the head."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz steps (Jordan 2024), all matrices of one shape at once.

    Updates are scaled to the size of AdamW's, 0.2 · sqrt(longer side) (Liu et al. 2025), so both share a learning rate.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            groups.setdefault(tuple(matrix.shape), []).append(matrix)
        super().__init__([{"params": group} for group in groups.values()], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices = group["params"]
            state = self.state[matrices[0]]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95))
            scale = 0.2 * math.sqrt(max(update.shape[-2:])) * group["lr"]
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.to(gradient.dtype).unbind()), alpha=-scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices; (count, rows, columns) in bfloat16."""
    x = matrices.bfloat16()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def build_model(vocabulary: int, settings: Settings) -> torch.nn.Module:
    """A Gemma-2 with random weights, float32; the vocabulary is rounded up to a multiple of 64."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=math.ceil(vocabulary / 64) * 64,
        hidden_size=settings.width,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        max_position_embeddings=2048,
        sliding_window=1024,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(settings.seed)
    return Gemma2ForCausalLM(config)


@functools.cache
def compiled_block_mask() -> Any:
    """`create_block_mask`, compiled once."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def document_mask(tokens: Tensor, compiled: bool) -> Any:
    """Causal attention within documents, which begin at BOS: a BlockMask on a GPU, else an additive mask."""
    document = (tokens == BOS).cumsum(1)
    if compiled:

        def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document[row, query] == document[row, key])

        size = tokens.shape[1]
        return compiled_block_mask()(visible, len(tokens), None, size, size, device=tokens.device)
    causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
    visible = causal & (document[:, :, None] == document[:, None, :])
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


def training_loss(model: torch.nn.Module, tokens: Tensor, kinds: Tensor, mask: Any, weights: Tensor) -> Tensor:
    """Cross-entropy of the next token, weighted by the kind of that token."""
    masks = {"full_attention": mask, "sliding_attention": mask}  # a row is no longer than the window
    hidden = model.model(input_ids=tokens, attention_mask=masks, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    cap = model.config.final_logit_softcapping
    logits = cap * torch.tanh(logits / cap)
    targets, kinds = tokens.roll(-1, 1).long(), kinds.roll(-1, 1).long()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    inside = torch.arange(tokens.shape[1], device=tokens.device) < tokens.shape[1] - 1  # the last has no next token
    weight = (weights[kinds] * inside).flatten()
    return (losses * weight).sum() / weight.sum().clamp(min=1)


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Linear warm-up, constant, linear fall to zero over the last `decay` of the steps."""
    left = (settings.steps - step) / max(1, round(settings.steps * settings.decay))
    return min(1.0, (step + 1) / settings.warmup, left)


def train_weights(corpus: Corpus, settings: Settings, log: list[dict[str, float]]) -> torch.nn.Module:
    """Train from scratch on the corpus's device, a fixed number of steps; `log` gets the mean loss of every 500."""
    device = corpus.ids.device.type
    fast = device == "cuda"
    model = build_model(len(corpus.vocabulary), settings).to(device)
    model.set_attn_implementation("flex_attention" if fast else "eager")
    matrices = layer_matrices(model)
    chosen = {id(matrix) for matrix in matrices} if settings.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay, fused=fast)
    ]
    if chosen:
        optimizers.append(Muon(matrices, settings.learning_rate, settings.weight_decay))
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    loss_of = torch.compile(training_loss, dynamic=False) if fast else training_loss
    weights = torch.tensor([0.0, settings.input_weight, 1.0], device=device)
    round_from = settings.steps - round(settings.steps * settings.nf4)
    total = torch.zeros((), device=device)
    began = time.perf_counter()
    for step, (tokens, kinds) in zip(range(settings.steps), batches(corpus, settings), strict=False):
        mask = document_mask(tokens, fast)
        if step >= round_from:  # straight through: gradients of the rounded weights, applied to the exact ones
            exact = [matrix.detach().clone() for matrix in matrices]
            with torch.no_grad():
                torch._foreach_copy_(matrices, [round_to_nf4(matrix) for matrix in matrices])
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            loss = loss_of(model, tokens, kinds, mask, weights)
        loss.backward()
        if step >= round_from:
            with torch.no_grad():
                torch._foreach_copy_(matrices, exact)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_factor(step, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(settings.average, step / (step + 10))
            torch._foreach_lerp_(average, parameters, 1 - decay)
        total += loss.detach()
        if (step + 1) % 500 == 0 or step + 1 == settings.steps:
            count = step % 500 + 1
            log.append({"step": step + 1, "loss": total.item() / count, "seconds": time.perf_counter() - began})
            total.zero_()
            print(log[-1], flush=True)
    if settings.average:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    return model


def learn_quotes(model: torch.nn.Module, corpus: Corpus, settings: Settings) -> None:
    """Teach the embeddings of the quotation marks, from those of the title marks, on text with quoted speech.

    Everything else stays as it is, so this runs on a CPU as well. The model must be in float32.
    """
    embedding = model.model.embed_tokens.weight
    random = torch.Generator().manual_seed(settings.seed)
    marks = torch.tensor(corpus.encode("".join(QUOTES)))
    model.requires_grad_(False)
    like = embedding[torch.tensor(corpus.encode("《》" * len(QUOTES)))]
    noise = torch.randn(like.shape, generator=random).to(like.device)
    embedding[marks] = like + 0.1 * like.std() * noise  # apart, or equal gradients would keep them equal
    small = dataclasses.replace(settings, rows=16, length=min(256, settings.length))
    tokens, kinds = build_epoch(corpus, small, random, quoted=True)
    useful = torch.isin(tokens, marks.to(tokens.device)).any(1)
    tokens, kinds = tokens[useful], kinds[useful]
    weights = torch.tensor([0.0, 1.0, 1.0], device=tokens.device)
    rows = embedding[marks].clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=settings.learning_rate)
    for step in range(settings.quote_steps if len(tokens) else 0):
        chosen = torch.randint(0, len(tokens), (small.rows,), generator=random)
        embedding.requires_grad_()
        batch = tokens[chosen]
        loss = training_loss(model, batch, kinds[chosen], document_mask(batch, compiled=False), weights)
        (gradient,) = torch.autograd.grad(loss, embedding)
        embedding.requires_grad_(False)
        rows.grad = gradient[marks]
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.quote_steps)
        optimizer.step()
        embedding[marks] = rows.detach()


# ------------------------------------------------------------------------------------------ tokenizer, scores


def build_tokenizer(vocabulary: list[str]) -> Any:
    """One token a character, the newline too; BOS in front when special tokens are asked for."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def score_documents(model: torch.nn.Module, documents: list[tuple[list[int], list[int]]]) -> float:
    """Mean negative log-likelihood of a token of the answers, EOS included; `documents` are (context, answer)."""
    device = next(model.parameters()).device
    documents = sorted(documents, key=lambda document: sum(map(len, document)))
    total, count = 0.0, 0
    for first in range(0, len(documents), 32):
        batch = documents[first : first + 32]
        size = max(len(context) + len(answer) for context, answer in batch)
        tokens = torch.full((len(batch), size), PAD)
        scored = torch.zeros(len(batch), size, dtype=torch.bool)
        for row, (context, answer) in enumerate(batch):
            end = len(context) + len(answer)
            tokens[row, :end] = torch.tensor(context + answer)
            scored[row, len(context) : end] = True
        tokens, scored = tokens.to(device), scored.to(device)
        with torch.no_grad():  # padding is on the right, where causal attention never looks
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[scored[:, 1:]]).float()
            cap = model.config.final_logit_softcapping
            loss = F.cross_entropy(cap * torch.tanh(logits / cap), tokens[:, 1:][scored[:, 1:]], reduction="sum")
        total += loss.item()
        count += int(scored[:, 1:].sum())
    return total / count


def held_out_loss(model: torch.nn.Module, corpus: Corpus) -> dict[str, float]:
    """Loss per direction on the held-out pairs, as documents `文言文：…\\n白話文：…`, with 0 and 4 pairs in front."""
    sides = []
    for pair, (classical, modern) in zip(
        corpus.ids.cpu().split(corpus.lengths.sum(1).tolist()), corpus.lengths.tolist(), strict=True
    ):
        sides.append((pair[:classical].tolist(), pair[classical : classical + modern].tolist()))
    labels = corpus.encode("文言文："), corpus.encode("白話文：")
    newline = corpus.encode("\n")
    losses = {}
    for name, (a, b) in {"classical_to_modern": (0, 1), "modern_to_classical": (1, 0)}.items():
        for shots in (0, 4):
            documents = []
            for number, pair in enumerate(sides):
                context = [BOS]
                for other in range(1, shots + 1):
                    example = sides[(number + other) % len(sides)]
                    context += labels[a] + example[a] + newline + labels[b] + example[b] + newline
                context += labels[a] + pair[a] + newline + labels[b]
                documents.append((context[: 1024 - len(pair[b]) - 1], pair[b] + [EOS]))
            losses[f"{name}_{shots}"] = score_documents(model, documents)
    return losses


def score(model: torch.nn.Module, held_out: Corpus) -> dict[str, dict[str, float]]:
    """Held-out losses of the weights in float32, and with the matrices of the layers rounded to NF4."""
    losses = {"held_out_loss": held_out_loss(model, held_out)}
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for matrix in layer_matrices(rounded):
            matrix.copy_(round_to_nf4(matrix))
    return losses | {"held_out_loss_nf4": held_out_loss(rounded, held_out)}


def train(encoded: Path, out: Path, settings: Settings) -> None:
    """Train, then save model, tokenizer, `training.json` and the model card to `out`.

    The scores are those of the bfloat16 weights before they learn the quotation marks, of which the held-out pairs
    have none, and `held_out_loss_saved` those of the weights as saved.
    """
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = load_corpus(encoded, device, held_out=False)
    log: list[dict[str, float]] = []
    began = time.perf_counter()
    model = train_weights(corpus, settings, log)
    seconds = time.perf_counter() - began
    model.set_attn_implementation("eager")
    model.bfloat16().float()
    machine = f"one {torch.cuda.get_device_name()}" if device == "cuda" else "a CPU"
    held_out = load_corpus(encoded, device, held_out=True)
    record = {
        "settings": dataclasses.asdict(settings),
        "corpus": corpus.summary,
        "parameters": sum(p.numel() for p in model.parameters()),
        **score(model, held_out),
        "training_loss": log,
        "seconds": seconds,
        "machine": machine,
        "quotes_machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    learn_quotes(model, corpus, settings)
    model.bfloat16().save_pretrained(out)
    build_tokenizer(corpus.vocabulary).save_pretrained(out)
    record["held_out_loss_saved"] = held_out_loss(model.float(), held_out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(out)


# ------------------------------------------------------------------------------------------------- model card

DIRECTIONS = {"classical_to_modern": "classical → modern", "modern_to_classical": "modern → classical"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_card(out: Path) -> None:
    """Write `README.md` from `training.json` and what `docs/base` holds: template, second run, trials."""

    def read(path: Path) -> Any:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    record = read(out / "training.json")
    if record is None:
        raise UserError(f"{out}: no training.json there")
    settings = Settings(**record["settings"])
    runs = [("before the quotation marks", record)]
    second = read(REPOSITORY / "docs/base/second_run.json")
    if second:
        runs.append(("the same, run again", second))
    kinds = ("held_out_loss", "held_out_loss_nf4")
    losses = []
    for name, title in DIRECTIONS.items():
        for label, run in runs:
            losses.append([title, label, *(f"{run[kind][f'{name}_{n}']:.4f}" for kind in kinds for n in (0, 4))])
        if saved := record.get("held_out_loss_saved"):
            losses.append([title, "this model as saved", *(f"{saved[f'{name}_{n}']:.4f}" for n in (0, 4)), "", ""])
    trials = read(REPOSITORY / "docs/base/tried.json")
    corpus = record["corpus"]
    text = (
        (REPOSITORY / "docs/base/card.md")
        .read_text(encoding="utf-8")
        .format(
            **{**dataclasses.asdict(settings), **corpus, "optimizer": OPTIMIZERS[settings.optimizer]},
            **{key: record[key] for key in ("machine", "quotes_machine", "torch", "transformers")},
            parameters=record["parameters"] / 1e6,
            head_dim=HEAD_DIM,
            pad=PAD,
            eos=EOS,
            bos=BOS,
            unk=UNK,
            min_count=MIN_COUNT,
            max_pair=MAX_PAIR,
            unknown=corpus["unknown_characters"],
            tokens=settings.rows * settings.length,
            minutes=record["seconds"] / 60,
            losses=table(["", "run", "no pair", "four pairs", "NF4, no pair", "NF4, four pairs"], losses),
            tried=describe_trials(trials) if trials else "No record.",
        )
    )
    (out / "README.md").write_text(text, encoding="utf-8")


OPTIMIZERS = {"muon": "Muon for the matrices of the layers, AdamW for the rest", "adamw": "AdamW"}


def describe_trials(trials: list[dict[str, Any]]) -> str:
    """A table with a line for each trial: what it changed from the first of its group, and its held-out loss."""
    rows = []
    first: dict[str, Any] = {}
    for trial in trials:
        settings = trial["settings"]
        if trial["group"] != first.get("group"):
            first = trial
        changes = [f"{key} {value}" for key, value in settings.items() if value != first["settings"][key]]
        means = [
            sum(trial[kind][f"{name}_{n}"] for n in (0, 4)) / 2
            for kind in ("held_out_loss", "held_out_loss_nf4")
            for name in DIRECTIONS
        ]
        name = f"**{trial['group']}**" if trial is first else ", ".join(changes) or "the same again"
        size, tokens = trial["parameters"] / 1e6, settings["steps"] * settings["rows"] * settings["length"] / 1e6
        rows.append([name, f"{size:.2f}", f"{tokens:,.0f}", *(f"{mean:.4f}" for mean in means)])
    names = list(DIRECTIONS.values())
    header = ["change", "M parameters", "M tokens", *names, *(f"NF4, {name}" for name in names)]
    return table(header, rows)


# ----------------------------------------------------------------------------------------------- command line


def parse_settings(changes: list[str]) -> Settings:
    """Settings with `name=value` changes. Raises UserError for a name or a value that does not fit."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    values = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in fields:
            raise UserError(f"--set {change}: no such setting; there are {', '.join(fields)}")
        kind = type(fields[name].default)
        try:
            values[name] = tuple(map(float, text.split(","))) if kind is tuple else kind(text)
        except ValueError:
            raise UserError(f"--set {change}: not a value of type {kind.__name__}") from None
    return Settings(**values)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("encode", "train", "build", "card"):
        sub = commands.add_parser(command)
        if command == "train":
            sub.add_argument("--encoded", type=Path, required=True, help="folder that encode wrote")
        elif command != "card":
            sub.add_argument("--corpus", type=Path, required=True, help="folder of *.tsv.xz: book, classical, modern")
        sub.add_argument("--out", type=Path, required=True, help="folder to write")
        if command in ("train", "build"):
            sub.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change a setting")
    options = parser.parse_args(arguments)
    try:
        if options.command == "encode":
            encode(options.corpus, options.out)
        elif options.command == "train":
            train(options.encoded, options.out, parse_settings(options.set))
        elif options.command == "build":
            settings = parse_settings(options.set)
            with tempfile.TemporaryDirectory() as encoded:
                encode(options.corpus, Path(encoded))
                train(Path(encoded), options.out, settings)
        else:
            write_card(options.out)
    except UserError as error:
        print(f"build_base: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
