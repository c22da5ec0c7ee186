"""Parsing of the numbers of rows of `hw3 data build`."""

import pytest

from hw3.cli import _build_parser, _parse


def test_build_accepts_all_training_rows_but_no_negative_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert _parse(_build_parser(), ["data", "build", "--train", "all"]).train is None
    assert _parse(_build_parser(), ["data", "build", "--train", "5"]).train == 5
    with pytest.raises(SystemExit):
        _parse(_build_parser(), ["data", "build", "--dev", "many"])
    assert "found many; expected a number of rows" in capsys.readouterr().err
