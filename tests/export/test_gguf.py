"""What `hw3 export --format gguf` refuses before it merges, and how it runs llama.cpp's converter."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import character_tokenizer, hw3

from hw3.config.schema import ModelSection
from hw3.export.gguf import CONVERTER, ConversionError, GgufOptions, check_gguf_arguments, convert
from hw3.runs.run import Run

MODEL = ModelSection(pretrained_model_name_or_path="none", dtype="float32")


def write_llama_cpp(folder: Path, converter: str) -> GgufOptions:
    """Write a folder that has only a converter."""
    folder.mkdir(parents=True)
    (folder / CONVERTER).write_text(converter, encoding="utf-8")
    return GgufOptions("f16", folder)


@pytest.fixture
def bpe_run(scored_run: Path, tmp_path: Path) -> Path:
    """A copy of a run whose tokenizer claims to be a BPE tokenizer."""
    run = shutil.copytree(scored_run, tmp_path / "run")
    file = run / "tokenizer/tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["type"] = "BPE"
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return run


def test_export_refuses_a_tokenizer_that_llama_cpp_does_not_have(scored_run: Path, tmp_path: Path) -> None:
    arguments = ["--format", "gguf", "--llama-cpp", tmp_path, "--output", tmp_path / "model"]
    _, stderr = hw3("export", scored_run, *arguments, expected=2)
    assert stderr == (
        f"hw3: {scored_run}: its tokenizer is of the kind WordLevel, but llama.cpp has only BPE, Unigram, WordPiece, "
        "so it cannot be a GGUF file; export it without FORMAT=gguf (--format gguf)\n"
    )
    assert not list(tmp_path.iterdir())


def test_export_without_llama_cpp_says_how_to_get_it(bpe_run: Path, tmp_path: Path) -> None:
    _, stderr = hw3("export", bpe_run, "--format", "gguf", expected=2)
    assert "LLAMA_CPP= (--llama-cpp): not set, but needed to convert; get llama.cpp with `git clone" in stderr
    _, stderr = hw3("export", bpe_run, "--format", "gguf", "--llama-cpp", tmp_path, expected=2)
    assert f"{tmp_path}: no convert_hf_to_gguf.py in this folder; get llama.cpp with `git clone" in stderr
    assert "`pip download --no-deps --no-binary llama-cpp-python llama-cpp-python`" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(["--quant", "q8_0"], "QUANT= (--quant)"), (["--llama-cpp", "folder"], "LLAMA_CPP= (--llama-cpp)")],
)
def test_export_refuses_options_of_another_format(arguments: list[str], name: str, scored_run: Path) -> None:
    _, stderr = hw3("export", scored_run, *arguments, expected=2)
    assert f"{name}: only for GGUF files; add FORMAT=gguf (--format gguf)" in stderr


def test_check_gguf_arguments_accepts_a_clone_and_a_source_package(bpe_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    clone = write_llama_cpp(tmp_path / "clone", "").llama_cpp
    nested = write_llama_cpp(tmp_path / "package/vendor/llama.cpp", "").llama_cpp
    assert check_gguf_arguments(Run(bpe_run), "gguf", None, clone) == GgufOptions("f16", clone)
    assert check_gguf_arguments(Run(bpe_run), "gguf", "q8_0", tmp_path / "package") == GgufOptions("q8_0", nested)
    assert check_gguf_arguments(Run(bpe_run), None, None, None) is None


@pytest.mark.parametrize(
    ("converter", "reason"),
    [
        ("import sys; open(sys.argv[1] + '/tokenizer.model')", "No such file or directory: 'tokenizer.model'"),
        ("import sys; print('ERROR:hf-to-gguf:Model X is not supported\\n', file=sys.stderr); sys.exit(1)", "^Model X"),
        ("import sys; sys.exit(1)", "no message"),
        ("", "no message"),
    ],
)
def test_convert_reports_the_last_line_of_the_converter(converter: str, reason: str, tmp_path: Path) -> None:
    options = write_llama_cpp(tmp_path / "llama.cpp", converter)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConversionError, match=reason):
        convert(tmp_path / "model", tmp_path / "model.gguf", options, tokenizer, MODEL, [])


def test_convert_gives_the_converter_the_setting_that_it_needs_to_write_the_flag(tmp_path: Path) -> None:
    """The tokenizer has a BOS token but does not add it, so the converter would not write `add_bos_token`."""
    copy_settings = (
        "import pathlib, shutil, sys\n"
        "source, output = pathlib.Path(sys.argv[1]), sys.argv[3]\n"
        "shutil.copy(source / 'tokenizer_config.json', output)\n"
    )
    options = write_llama_cpp(tmp_path / "llama.cpp", copy_settings)
    (tmp_path / "llama.cpp/gguf-py/gguf/scripts").mkdir(parents=True)
    (tmp_path / "llama.cpp/gguf-py/gguf/scripts/gguf_set_metadata.py").write_text(
        "import sys; open('calls.txt', 'a').write(repr(sys.argv[1:]) + '\\n')".replace(
            "'calls.txt'", repr(str(tmp_path / "calls.txt"))
        ),
        encoding="utf-8",
    )
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    output = convert(tmp_path / "model", tmp_path / "model.gguf", options, tokenizer, MODEL, [])
    assert json.loads(output.read_text(encoding="utf-8"))["add_bos_token"] is False
    assert "add_bos_token" not in json.loads((tmp_path / "model/tokenizer_config.json").read_text(encoding="utf-8"))
    assert (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines() == [
        f"['--force', '{output}', 'tokenizer.ggml.add_bos_token', '1']",
        f"['--force', '{output}', 'tokenizer.ggml.add_eos_token', '']",
    ]
    assert not (tmp_path / "model.input").exists()
