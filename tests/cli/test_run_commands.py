"""Parsing of the command line: strict options, and positional arguments after options."""

import pytest

from hw3.cli import _build_parser, _parse, main


@pytest.mark.parametrize(
    "arguments", [["train"], ["trian", "x.yaml"], ["train", "x.yaml", "--runn", "y"], ["eval", "x", "a=b"]]
)
def test_unknown_commands_and_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_options_cannot_be_abbreviated() -> None:
    with pytest.raises(SystemExit):
        _parse(_build_parser(), ["eval", "run", "--base"])


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["train", "x.yaml", "lora.r=4", "--run", "y", "lora.r=8"], ["lora.r=4", "lora.r=8"]),
        (
            ["predict", "run", "--shots", "1", "rows.json", "generation.num_beams=2"],
            ["rows.json", "generation.num_beams=2"],
        ),
        (["predict", "run", "--shots", "1", "-"], ["-"]),
    ],
)
def test_overrides_and_the_file_to_predict_may_follow_options(arguments: list[str], overrides: list[str]) -> None:
    assert _parse(_build_parser(), arguments).overrides == overrides
