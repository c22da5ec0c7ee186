"""Convert an exported model to a GGUF file with llama.cpp's own converter.

Nothing here imports PyTorch: the converter runs in its own process.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hw3.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hw3.config.schema import ModelSection
    from hw3.runs.run import Run

# Bytes per weight of the converter's types. Its ternary types are left out: they only suit models trained with them.
BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
# Kinds of the `tokenizers` library for which llama.cpp has a tokenizer. It has none for WordLevel, one token per word.
TOKENIZER_KINDS = ("BPE", "Unigram", "WordPiece")
CONVERTER = "convert_hf_to_gguf.py"
_SET_METADATA = "gguf-py/gguf/scripts/gguf_set_metadata.py"
_HOW_TO_GET_LLAMA_CPP = (
    "get llama.cpp with `git clone --depth 1 https://github.com/ggml-org/llama.cpp`, or with `pip download --no-deps "
    "--no-binary llama-cpp-python llama-cpp-python` and `tar xzf llama_cpp_python-*.tar.gz`"
)

logger = logging.getLogger(__name__)


class ConversionError(Exception):
    """The converter failed; the message is its last line."""


@dataclass(frozen=True)
class GgufOptions:
    """How `hw3 export --format gguf` converts.

    Attributes:
        quantization: type of the weights, a key of `BYTES_PER_WEIGHT`.
        llama_cpp: folder of llama.cpp, with `CONVERTER`.
    """

    quantization: str
    llama_cpp: Path


def check_gguf_arguments(
    run: Run, format: str | None, quantization: str | None, llama_cpp: Path | None
) -> GgufOptions | None:
    """Check the arguments of `hw3 export` for GGUF; return None without them.

    Args:
        run: the run to export.
        format: `--format`.
        quantization: `--quant`.
        llama_cpp: `--llama-cpp`: a clone of llama.cpp, or an unpacked source package of llama-cpp-python.

    Raises:
        UserError: an argument is wrong, the converter cannot run, or it has no tokenizer of this kind.
    """
    if format is None:
        if quantization is not None or llama_cpp is not None:
            option = "LLAMA_CPP= (--llama-cpp)" if quantization is None else "QUANT= (--quant)"
            raise UserError(f"{option}: only for GGUF files; add FORMAT=gguf (--format gguf)")
        return None
    _check_tokenizer_kind(run)
    if llama_cpp is None:
        raise UserError(f"LLAMA_CPP= (--llama-cpp): not set, but needed to convert; {_HOW_TO_GET_LLAMA_CPP}")
    folders = [folder for folder in (llama_cpp, llama_cpp / "vendor/llama.cpp") if (folder / CONVERTER).is_file()]
    if not folders:
        raise UserError(f"{llama_cpp}: no {CONVERTER} in this folder; {_HOW_TO_GET_LLAMA_CPP}")
    if importlib.util.find_spec("sentencepiece") is None:
        raise UserError("llama.cpp's converter needs the package sentencepiece; run: pip install sentencepiece")
    return GgufOptions(quantization or "f16", folders[0])


def _check_tokenizer_kind(run: Run) -> None:
    """Check that llama.cpp has a tokenizer of this kind.

    Raises:
        UserError: it has none.
    """
    try:
        kind = json.loads((run.tokenizer_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # the converter reports it
    if kind not in TOKENIZER_KINDS:
        raise UserError(
            f"{run}: its tokenizer is of the kind {kind}, but llama.cpp has only {', '.join(TOKENIZER_KINDS)}, so it "
            "cannot be a GGUF file; export it without FORMAT=gguf (--format gguf)"
        )


def convert_vocabulary(
    folder: Path, options: GgufOptions, tokenizer: PreTrainedTokenizerBase, model: ModelSection
) -> Path:
    """Convert only configuration and tokenizer, to find out in seconds whether llama.cpp knows the model.

    Args:
        folder: an empty folder to write to.
        options: how to convert.
        tokenizer: the tokenizer of the exported model.
        model: the base model.

    Returns:
        A GGUF file without weights.

    Raises:
        UserError: the converter refuses the model; the message has its reason.
    """
    from hw3.modeling.loading import load_model_config

    config = load_model_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the exported model has none
    set_token_ids(config, tokenizer)
    config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    try:
        return convert(folder / "model", folder / "vocabulary.gguf", options, tokenizer, model, ["--vocab-only"])
    except ConversionError as error:
        hint = "; put it into the base model's folder" if "tokenizer.model" in str(error) else ""
        raise UserError(
            f"{model.pretrained_model_name_or_path}: llama.cpp's converter in {options.llama_cpp} refuses this model: "
            f"{error}{hint}; nothing was written"
        ) from error


def set_token_ids(config: object, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the ids of BOS, EOS and padding of a configuration to those of the tokenizer."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def convert(
    folder: Path,
    output: Path,
    options: GgufOptions,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelSection,
    arguments: list[str],
) -> Path:
    """Convert a model folder to a GGUF file that adds BOS as in training.

    Args:
        folder: the folder of a model.
        output: the file to write.
        options: how to convert.
        tokenizer: the model's tokenizer.
        model: the base model, which may have a SentencePiece file.
        arguments: more arguments of the converter.

    Returns:
        `output`.

    Raises:
        ConversionError: the converter failed.
    """
    links = output.with_suffix(".input")
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file.resolve())
    _write_tokenizer_settings(links / "tokenizer_config.json", tokenizer)
    if (sentencepiece_file := _find_sentencepiece_file(model)) is not None and not (links / "tokenizer.model").exists():
        (links / "tokenizer.model").symlink_to(sentencepiece_file)
    converter = options.llama_cpp / CONVERTER
    done = _run_python(converter, links, "--outfile", output, "--outtype", options.quantization, *arguments)
    if done.returncode or not output.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ConversionError(lines[-1].replace(f"{links}/", "").removeprefix("ERROR:hf-to-gguf:").strip())
    for file in links.iterdir():
        file.unlink()
    links.rmdir()
    _set_flag(output, "tokenizer.ggml.add_bos_token", tokenizer.bos_token_id is not None, options)
    _set_flag(output, "tokenizer.ggml.add_eos_token", False, options)
    return output


def _write_tokenizer_settings(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace a link to `tokenizer_config.json` by a copy with which the converter always writes `add_bos_token`.

    The converter writes it if the tokenizer adds BOS or has this setting. The setting must not contradict the
    tokenizer here: the converter recognizes tokenizers by what they make of a text. `_set_flag` corrects it later.
    """
    settings = json.loads(file.read_text(encoding="utf-8"))
    if tokenizer.bos_token_id not in tokenizer("a")["input_ids"]:
        settings["add_bos_token"] = False
    file.unlink()
    file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def _find_sentencepiece_file(model: ModelSection) -> Path | None:
    """Return the base model's `tokenizer.model`, which the converter needs for Gemma; None if there is none.

    transformers 5 saves only `tokenizer.json`.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(model.pretrained_model_name_or_path, "tokenizer.model", revision=model.revision)
    except OSError:
        return None
    return None if path is None else Path(path).resolve()


def _set_flag(file: Path, key: str, value: bool, options: GgufOptions) -> None:
    """Set a flag of a GGUF file in place, with gguf's own program. A flag that the file lacks is off.

    The converter writes False for all vocabularies of 49,152 tokens, SmolLM2's among them, whatever the tokenizer does.
    """
    # The program parses the value with `bool`, for which only the empty string is False.
    done = _run_python(options.llama_cpp / _SET_METADATA, "--force", file, key, "1" if value else "")
    if done.returncode and value:
        lines = done.stderr.splitlines() or ["no message"]
        raise ConversionError(f"{key} cannot be set: {lines[-1]}")


def _run_python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script of llama.cpp with this Python, without the hub."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    logger.debug(done.stderr)
    return done
