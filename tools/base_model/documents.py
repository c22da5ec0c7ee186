"""Draw training documents from the pairs and lay them out as packed rows of tokens.

A document is one to eight neighboring pairs in one layout (`base_model.layouts`) and ends with EOS, so that the pairs
before an input show the model what is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from base_model.encoding import EncodedCorpus
from base_model.layouts import BARE, BARE_FORMS, DIRECTED, DIRECTED_LABELS, FORMS, PLAIN, PLAIN_LABELS, RANDOM
from base_model.settings import BOS, EOS, QUOTES, TrainingSettings
from hw3.common.errors import UserError

NO_LOSS, INPUT, OUTPUT = range(3)  # kinds of a training token


def draw_documents(pairs: int, settings: TrainingSettings, random: torch.Generator) -> dict[str, Tensor]:
    """Draw the documents of one epoch: neighboring pairs in random groups, in random order.

    Returns:
        Tensors with one value per pair, in reading order: `pair` (its index), `first` and `last` (of its document),
        `swap` (the modern text is the input), and the document's `document` (its index), `style`, `label`, `form`,
        `one_to_one`, `preamble` and `fill`.
    """

    def is_drawn(size: int, probability: float) -> Tensor:
        return torch.rand(size, generator=random) < probability

    def draw_integers(size: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=random)

    sizes = torch.where(is_drawn(pairs, settings.single), 1, draw_integers(pairs, 2, 9))
    ends = sizes.cumsum(0)
    count = int((ends < pairs).sum()) + 1
    sizes, ends = sizes[:count], ends[:count].clamp(max=pairs)
    sizes[-1] = pairs - (ends[-2] if count > 1 else 0)
    starts = ends - sizes
    order = torch.randperm(count, generator=random)
    style = torch.multinomial(torch.tensor(settings.styles), count, replacement=True, generator=random)
    document = {
        "swap": is_drawn(count, 0.5),
        "mixed": is_drawn(count, settings.mixed),
        "style": style,
        "label": draw_integers(count, 0, 2**30),
        "form": draw_integers(count, 0, 2**30),
        "one_to_one": is_drawn(count, settings.one_to_one),
        "preamble": (style == RANDOM) & is_drawn(count, 0.5),
        "fill": torch.where(style == RANDOM, draw_integers(count, 0, 3), 0),  # 1: before the text, 2: after it
    }
    sizes = sizes[order]
    document_of_pair = torch.repeat_interleave(sizes)
    first_position = sizes.cumsum(0) - sizes
    position = torch.arange(pairs) - first_position[document_of_pair]
    drawn = {name: value[document_of_pair] for name, value in document.items()}
    drawn["swap"] = torch.where(drawn.pop("mixed"), is_drawn(pairs, 0.5), drawn["swap"])
    drawn["pair"] = starts[order][document_of_pair] + position
    drawn["first"], drawn["last"] = position == 0, position == sizes[document_of_pair] - 1
    drawn["document"] = document_of_pair
    return drawn


class PieceSource:
    """The tokens of all documents: the corpus, followed by literal texts. A piece is (start, length) in this sequence.

    Args:
        corpus: the pairs.
        random: a CPU generator.
    """

    def __init__(self, corpus: EncodedCorpus, random: torch.Generator) -> None:
        self._corpus = corpus
        self._random = random
        self._literal_ids: list[int] = []
        self._literals: dict[str, tuple[int, int]] = {}

    def literals(self, texts: Iterable[str]) -> Tensor:
        """Return the pieces of literal texts, (texts, 2); "<bos>" and "<eos>" are the special tokens."""
        return torch.tensor([self._literal(text) for text in texts], device=self._corpus.ids.device)

    def _literal(self, text: str) -> tuple[int, int]:
        if text not in self._literals:
            ids = {"<bos>": [BOS], "<eos>": [EOS]}.get(text) or self._corpus.encode(text)
            self._literals[text] = (len(self._corpus.ids) + len(self._literal_ids), len(ids))
            self._literal_ids.extend(ids)
        return self._literals[text]

    def random_fragments(self, size: int, low: int, high: int) -> Tensor:
        """Return random stretches of the corpus of `low` to `high - 1` characters, (size, 2)."""
        corpus_length = len(self._corpus.ids)
        start = torch.randint(0, max(1, corpus_length - high), (size,), generator=self._random)
        length = torch.randint(low, high, (size,), generator=self._random).clamp(max=corpus_length)
        return torch.stack([start, length], 1).to(self._corpus.ids.device)

    def tokens(self) -> Tensor:
        """Return the sequence that all pieces so far point into, int32."""
        literal_ids = torch.tensor(self._literal_ids, dtype=torch.int32, device=self._corpus.ids.device)
        return torch.cat([self._corpus.ids, literal_ids])


def build_epoch(
    corpus: EncodedCorpus, settings: TrainingSettings, random: torch.Generator, quoted: bool = False
) -> tuple[Tensor, Tensor]:
    """Lay out one epoch as packed rows. The last row is dropped if it is not full.

    Every document is BOS, its pairs, EOS. A pair cut by the end of a row has no loss in the next row, where the
    beginning of its text cannot be seen.

    Args:
        corpus: the pairs.
        settings: sizes and shares.
        random: a CPU generator, so that every device draws the same documents.
        quoted: put speech after a colon in quotation marks.

    Returns:
        Tokens int32 and kinds uint8 (NO_LOSS, INPUT or OUTPUT), both of shape (rows, length).

    Raises:
        UserError: the corpus does not fill one row.
    """
    documents = draw_documents(len(corpus.lengths), settings, random)
    drawn = {name: value.to(corpus.ids.device) for name, value in documents.items()}
    source = PieceSource(corpus, random)
    pieces = lay_out_pieces(corpus, source, drawn, quoted)
    starts, sizes = torch.stack([piece for piece, _ in pieces], 1).unbind(2)  # (pairs, pieces) each
    kinds = torch.tensor([kind for _, kind in pieces], dtype=torch.uint8, device=corpus.ids.device)
    rows = int(sizes.sum()) // settings.length
    if rows == 0:
        raise UserError(f"the corpus does not fill one row of {settings.length} tokens")

    sizes = sizes.flatten()
    piece_starts = sizes.cumsum(0) - sizes  # positions in the epoch
    piece = torch.repeat_interleave(sizes)[: rows * settings.length]  # the piece of each token
    position = torch.arange(len(piece), device=corpus.ids.device)
    tokens = source.tokens()[starts.flatten()[piece] + position - piece_starts[piece]]
    pair = piece // len(pieces)
    tokens = torch.where(drawn["one_to_one"][pair], corpus.one_to_one[tokens], tokens)
    pair_start = piece_starts.view(-1, len(pieces))[:, 0]
    begins_in_row = pair_start[pair] // settings.length == position // settings.length
    kind = torch.where(begins_in_row, kinds[piece % len(pieces)], NO_LOSS)
    return tokens.view(rows, -1), kind.view(rows, -1)


def lay_out_pieces(
    corpus: EncodedCorpus, source: PieceSource, drawn: dict[str, Tensor], quoted: bool
) -> list[tuple[Tensor, int]]:
    """Return the pieces of every pair in writing order: (start, length) of shape (pairs, 2), and the tokens' kind."""
    bos, eos, newline, nothing = source.literals(["<bos>", "<eos>", "\n", ""])
    form = choose_forms(source, drawn)
    labels = choose_labels(source, drawn)
    inputs, outputs = text_pieces(corpus, source, drawn, quoted)
    preamble = drawn["first"] & drawn["preamble"]
    fills = source.random_fragments(len(corpus.lengths), 3, 12)
    fill_before, fill_after = drawn["fill"] == 1, drawn["fill"] == 2
    after_label = _select(drawn["style"] == BARE, nothing, form[:, 1])
    return [
        (_select(drawn["first"], bos, nothing), NO_LOSS),
        (_select(preamble, source.random_fragments(len(corpus.lengths), 10, 80), nothing), NO_LOSS),
        (_select(preamble, newline, nothing), NO_LOSS),
        (form[:, 0], NO_LOSS),
        (labels[0], NO_LOSS),
        (after_label, NO_LOSS),
        (_select(fill_before, fills, nothing), NO_LOSS),
        (_select(fill_before, newline, nothing), NO_LOSS),
        *((text, INPUT) for text in inputs),
        (_select(fill_after, newline, nothing), NO_LOSS),
        (_select(fill_after, fills, nothing), NO_LOSS),
        (form[:, 2], NO_LOSS),
        (form[:, 0], NO_LOSS),
        (labels[1], NO_LOSS),
        (after_label, NO_LOSS),
        *((text, OUTPUT) for text in outputs),
        (_select(drawn["last"], eos, form[:, 3]), OUTPUT),
    ]


def _select(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    return torch.where(condition[:, None], chosen, other)


def choose_forms(source: PieceSource, drawn: dict[str, Tensor]) -> Tensor:
    """Return the pieces before, after, break and separator of each pair's form, (pairs, 4, 2)."""
    forms = source.literals(text for form in [*BARE_FORMS, *FORMS] for text in form).view(-1, 4, 2)
    bare, labeled = drawn["form"] % len(BARE_FORMS), len(BARE_FORMS) + drawn["form"] % len(FORMS)
    return forms[torch.where(drawn["style"] == BARE, bare, labeled)]


def choose_labels(source: PieceSource, drawn: dict[str, Tensor]) -> list[Tensor]:
    """Return the labels of each pair's input and output, (pairs, 2) each."""
    style, document = drawn["style"], drawn["document"]
    label_pairs = [("", ""), *DIRECTED_LABELS, *PLAIN_LABELS]
    table = source.literals(text for pair in label_pairs for text in pair).view(-1, 2, 2)
    label = torch.zeros_like(style)
    label = torch.where(style == DIRECTED, 1 + drawn["label"] % len(DIRECTED_LABELS), label)
    label = torch.where(style == PLAIN, 1 + len(DIRECTED_LABELS) + drawn["label"] % len(PLAIN_LABELS), label)
    input_side = torch.where(style == DIRECTED, drawn["swap"].long(), 0)
    documents = int(document[-1]) + 1
    random_labels = [source.random_fragments(documents, 1, 7)[document] for _ in range(2)]
    fixed_labels = table[label, input_side], table[label, 1 - input_side]
    return [
        _select(style == RANDOM, random_label, fixed)
        for random_label, fixed in zip(random_labels, fixed_labels, strict=True)
    ]


def text_pieces(
    corpus: EncodedCorpus, source: PieceSource, drawn: dict[str, Tensor], quoted: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the pieces of each pair's input and of its output; with `quoted`, speech stands in quotation marks."""
    ends = corpus.lengths.sum(1).cumsum(0)
    start = (ends - corpus.lengths.sum(1))[drawn["pair"]]
    lengths = corpus.lengths[drawn["pair"]]
    sides = [torch.stack([start, lengths[:, 0]], 1), torch.stack([start + lengths[:, 0], lengths[:, 1]], 1)]
    pieces = [[side] for side in sides]
    if quoted:
        (nothing,) = source.literals([""])
        quotes = source.literals(mark for pair in QUOTES for mark in pair).view(-1, 2, 2)
        marks = quotes[(drawn["label"] % 8 - 5).clamp(min=0)]  # the first pair of marks in 6 of 8 documents
        offset, has_speech = (value[drawn["pair"]] for value in find_speech(corpus))
        pieces = [quote_speech(side, offset[:, i], has_speech, marks, nothing) for i, side in enumerate(sides)]
    classical, modern = pieces
    inputs = [_select(drawn["swap"], m, c) for c, m in zip(classical, modern, strict=True)]
    outputs = [_select(drawn["swap"], c, m) for c, m in zip(classical, modern, strict=True)]
    return inputs, outputs


def find_speech(corpus: EncodedCorpus) -> tuple[Tensor, Tensor]:
    """Find where speech begins: after the first colon.

    Returns:
        Offsets (pairs, 2), and whether both sides have a colon that is not their last character (pairs,).
    """
    lengths = corpus.lengths.flatten()
    ends = lengths.cumsum(0)
    colons = (corpus.ids == corpus.encode("：")[0]).nonzero().flatten()
    side = torch.searchsorted(ends, colons, right=True)
    first = torch.full_like(ends, 2**40).scatter_reduce(0, side, colons, "amin")
    offset = first + 1 - (ends - lengths)
    return offset.view(-1, 2), (offset < lengths).view(-1, 2).all(1)


def quote_speech(side: Tensor, offset: Tensor, has_speech: Tensor, marks: Tensor, nothing: Tensor) -> list[Tensor]:
    """Return one side of each pair as four pieces (pairs, 2): text, opening mark, speech, closing mark."""
    start, length = side.unbind(1)
    offset = torch.where(has_speech, offset, length)
    opening, closing = (_select(has_speech, marks[:, i], nothing) for i in (0, 1))
    return [
        torch.stack([start, offset], 1),
        opening,
        torch.stack([start + offset, length - offset], 1),
        closing,
    ]


def iterate_batches(corpus: EncodedCorpus, settings: TrainingSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of tokens and kinds (rows, length) without end. Every epoch draws new documents.

    Raises:
        UserError: the corpus fills less than one batch.
    """
    random = torch.Generator().manual_seed(settings.seed)
    while True:
        tokens, kinds = build_epoch(corpus, settings, random)
        if len(tokens) < settings.rows:
            raise UserError(f"the corpus fills {len(tokens)} rows; a step needs {settings.rows}")
        for start in range(0, len(tokens) - settings.rows + 1, settings.rows):
            yield tokens[start : start + settings.rows], kinds[start : start + settings.rows]
