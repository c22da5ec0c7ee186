"""Conversions from simplified to Traditional characters."""

from pathlib import Path

import pytest
from sample_corpus import run_build

from hw3.corpus.script_conversion import make_converter


def test_make_converter_converts_as_opencc_and_hanziconv_do() -> None:
    assert make_converter("s2tw")(["他出了门。", "公元前后"]) == ["他出了門。", "公元前後"]
    assert make_converter("hanziconv")(["他出了门。"]) == ["他齣瞭門。"]
    assert make_converter("none")(["他出了门。"]) == ["他出了门。"]
    hanziconv = pytest.importorskip("hanziconv").HanziConv.toTraditional
    all_characters = "".join(map(chr, range(0x4E00, 0xA000)))
    assert make_converter("hanziconv")([all_characters]) == [hanziconv(all_characters)]


def test_build_names_a_missing_hanziconv_before_reading_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hanziconv.charmap", None)
    run_build("nowhere", tmp_path / "out", "--convert", "hanziconv", expected_status=2)
    assert "pip install -c constraints.txt hanziconv" in capsys.readouterr().err
