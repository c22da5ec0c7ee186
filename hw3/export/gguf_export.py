"""The GGUF part of `hw3 export`: refuse what llama.cpp cannot read, convert, and compare with the checkpoint."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hw3.common.disk import format_bytes
from hw3.common.errors import RunError
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.selection import ScoredCheckpoint
from hw3.export.gguf import ConversionError, GgufOptions, convert, convert_vocabulary
from hw3.export.gguf_check import check_tokens, compare_scores, is_llama_cpp_installed
from hw3.export.modelfile import build_modelfile


class GgufExport:
    """Writes a GGUF file and a `Modelfile` into the folder of an exported model.

    Args:
        options: how to convert.
        scored: the exported checkpoint.
        tokenizer: the exported tokenizer.
    """

    def __init__(self, options: GgufOptions, scored: ScoredCheckpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        self._options = options
        self._scored = scored
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer, scored.recipe.prompt)

    def check_vocabulary(self, folder: Path) -> None:
        """Check, before the model is merged, that llama.cpp knows it and makes the same tokens of every prompt.

        Args:
            folder: an empty folder to write to.

        Raises:
            UserError: the converter refuses the model.
            RunError: llama.cpp makes other tokens.
        """
        folder.mkdir()
        file = convert_vocabulary(folder, self._options, self._tokenizer, self._scored.recipe.model)
        if is_llama_cpp_installed():
            check_tokens(file, self._encoder, read_rows(self._scored.data_file))

    def write(self, folder: Path, name: str) -> str:
        """Convert the model in a folder, and write a `Modelfile` beside the GGUF file.

        Args:
            folder: the exported model.
            name: name of the model.

        Returns:
            The name of the GGUF file.

        Raises:
            RunError: the converter failed.
        """
        file = folder / f"{name}-{self._options.quantization}.gguf"
        temporary = folder.with_name("model.gguf")
        recipe = self._scored.recipe
        arguments = ["--model-name", name]
        try:
            convert(folder, temporary, self._options, self._tokenizer, recipe.model, arguments)
        except ConversionError as error:
            raise RunError(f"llama.cpp's converter in {self._options.llama_cpp} failed: {error}") from error
        temporary.rename(file)
        generation_config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        stop_tokens = self._tokenizer.convert_ids_to_tokens(generation_config["eos_token_id"])
        modelfile = build_modelfile(file.name, recipe.prompt, recipe.generation, self._tokenizer, stop_tokens)
        (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
        return file.name

    def report(self, file: Path) -> int:
        """Print how the GGUF file scores beside its checkpoint, and how to use it; return the exit status.

        Raises:
            RunError: a token differs, or llama.cpp failed.
        """
        print(f"{file}: {format_bytes(file.stat().st_size)}")
        name = shlex.quote(file.parent.name.lower())
        print(f"  ollama create {name} -f {shlex.quote(str(file.parent / 'Modelfile'))}")
        print(f"  llama-server --jinja -m {shlex.quote(str(file))}")
        if not is_llama_cpp_installed():
            print("  not compared with the checkpoint, for lack of llama-cpp-python: pip install llama-cpp-python")
            return 0
        comparison = compare_scores(file, self._scored, self._encoder, self._options.quantization)
        print(comparison.describe())
        if comparison.is_explained:
            return 0
        raise RunError(
            f"{file}: rounding to {self._options.quantization} does not explain this difference; the file is kept, but "
            "compare its outputs before you use it"
        )
