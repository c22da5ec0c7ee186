"""Failures of the disk are explained, also those that libraries report in their own exceptions."""

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import character_tokenizer
from safetensors.torch import save_file

from hw3.cli import main
from hw3.common.storage_errors import explain_storage_error

WRITES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 10_000, encoding="utf-8"),
    "torch": lambda path: torch.save({"a": torch.zeros(10_000)}, path),
    "torch, the last bytes": lambda path: torch.save({"a": torch.zeros(10)}, path),
    "safetensors": lambda path: save_file({"a": torch.zeros(10_000)}, path),
    "tokenizers": lambda path: character_tokenizer().backend_tokenizer.save(str(path)),
    "pyarrow": lambda path: pq.write_table(pa.table({"a": list(range(10_000))}), path),
}


@contextlib.contextmanager
def limited_file_size() -> Iterator[None]:
    """Let every write beyond the first 100 bytes of a file fail inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("library", WRITES)
def test_explain_storage_error_explains_failed_writes_of_libraries(library: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught, limited_file_size():
        WRITES[library](tmp_path / "file")
    message = explain_storage_error(caught.value, [tmp_path / "run"])
    assert message is not None and message.startswith(f"{tmp_path}/run (")
    assert "raise the limit on the size of files" in message or "free some space there" in message


def test_explain_storage_error_tells_to_free_space() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "run/checkpoint-4/optimizer.pt")
    assert explain_storage_error(error, []) == (
        "run/checkpoint-4/optimizer.pt: No space left on device; free some space there, then run the same command "
        "again; complete files are intact"
    )


@pytest.mark.parametrize("error", [ValueError("a (bug)"), KeyError("x"), OSError("Can't load the model"), OSError(9)])
def test_explain_storage_error_does_not_explain_other_errors(error: Exception) -> None:
    assert explain_storage_error(error, []) is None


def test_explain_storage_error_finds_the_cause() -> None:
    try:
        try:
            os.rmdir("/proc/1/none/gone")
        except OSError as error:
            raise RuntimeError("cannot save") from error
    except RuntimeError as error:
        message = explain_storage_error(error, [])
    assert message is not None and message.startswith("/proc/1/none/gone: No such file or directory; if it was moved")


def test_explain_storage_error_names_a_folder_that_is_gone_when_pytorch_writes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.save({}, tmp_path / "gone" / "optimizer.pt")
    assert explain_storage_error(caught.value, []) == (
        f"{tmp_path}/gone: No such file or directory; if it was moved or deleted while the command ran, run the same "
        "command again"
    )


def test_a_name_that_is_too_long_ends_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    assert main(["data", "build", "--corpus", str(tmp_path), "--output", str(tmp_path / name)]) in (1, 2)
    error = capsys.readouterr().err
    assert "File name too long" in error and "Traceback" not in error
