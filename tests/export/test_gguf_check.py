"""The comparison of a GGUF file with its checkpoint: tokens first, then scores within a stated bound."""

import math

import pytest
from helpers import character_tokenizer

from hw3.cli import main
from hw3.common.errors import RunError
from hw3.data.prompt import Prompt
from hw3.data.rows import Row
from hw3.data.tokenization import Encoder
from hw3.evaluation.perplexity import RowScore
from hw3.export.gguf import BYTES_PER_WEIGHT
from hw3.export.gguf_check import MAX_DIFFERENCE, Comparison, _compare_tokens, render_prompt_text

ROW = Row(id="a", instruction="甲", output="乙")
PROMPT = Prompt(system="天", turn="問：{instruction}\n答：")


def make_comparison(*nlls: float, max_difference: float = 0.01) -> Comparison:
    """Return a comparison of rows with 10 tokens and 20 nats."""
    checkpoint = [RowScore(str(number), 20.0, 10, 8) for number in range(len(nlls))]
    llama_cpp = [RowScore(str(number), nll, 10, 8) for number, nll in enumerate(nlls)]
    return Comparison(checkpoint, llama_cpp, max_difference, "0.3")


def test_comparison_judges_the_largest_difference_per_token() -> None:
    comparison = make_comparison(20.05, 19.92)
    assert comparison.differences == pytest.approx([0.05, -0.08])
    assert comparison.per_token == pytest.approx([0.005, 0.008]) and comparison.is_explained
    assert not make_comparison(20.05, 19.8).is_explained
    assert not make_comparison(20.0, math.nan).is_explained


def test_comparison_describes_every_row_and_the_bound() -> None:
    lines = make_comparison(20.05, 19.92).describe().splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["0", "10", "20.0000", "20.0500", "+0.0500"],
        ["1", "10", "20.0000", "19.9200", "-0.0800"],
    ]
    assert lines[3] == (
        "  mean perplexity of these 2 rows: 7.3891 for the checkpoint, 7.3781 in llama.cpp; largest difference of a "
        "row 0.0800 nats, 0.00800 per token, of at most 0.01"
    )
    assert make_comparison(20.0, max_difference=math.inf).describe().endswith("0.00000 per token")


def test_compare_tokens_accepts_equal_ids() -> None:
    encoder = Encoder(character_tokenizer(), PROMPT)
    ids = encoder.encode_prompt("甲")
    assert ids[0] == 2 and encoder.encode_text(render_prompt_text(encoder, "甲")) == ids[1:]
    _compare_tokens({"bos": 2, "eos": 1, "ids": [ids]}, encoder, [ROW])


def test_compare_tokens_reports_bos_eos_and_the_first_other_token() -> None:
    encoder = Encoder(character_tokenizer(), PROMPT)
    ids = encoder.encode_prompt("甲")
    for response, message in (
        ({"bos": 0, "eos": 1, "ids": [ids]}, "^BOS is 2 in the run's tokenizer, but 0 in llama.cpp"),
        ({"bos": 2, "eos": 0, "ids": [ids]}, "^EOS is 1 in the run's tokenizer, but 0 in llama.cpp"),
        ({"bos": 2, "eos": 1, "ids": [ids[1:]]}, r"^row a: .* from token 0 on, 8 instead of 9 in all$"),
        (
            {"bos": 2, "eos": 1, "ids": [ids[:-1]]},
            r"^row a: .*: \[\] instead of \[\d+\] from token 8 on, 8 instead of",
        ),
    ):
        with pytest.raises(RunError, match=message):
            _compare_tokens(response, encoder, [ROW])


def test_compare_tokens_compares_no_bos_if_the_tokenizer_has_none() -> None:
    encoder = Encoder(character_tokenizer(bos=False), PROMPT)
    _compare_tokens({"bos": 11, "eos": 1, "ids": [encoder.encode_prompt("甲")]}, encoder, [ROW])


def test_every_type_of_weights_has_an_option_a_size_and_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(BYTES_PER_WEIGHT) == set(MAX_DIFFERENCE)
    with pytest.raises(SystemExit):
        main(["export", "run", "--format", "gguf", "--quant", "q4"])
    assert f"choose from {', '.join(BYTES_PER_WEIGHT)})" in capsys.readouterr().err.replace("'", "")
