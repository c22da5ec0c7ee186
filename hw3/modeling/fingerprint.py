"""Content hashes of base models, adapters and tokenizers."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hw3.common.hashing import file_sha256
from hw3.config.schema import ModelSection

# File names of a PEFT adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer's vocabulary, merges, special tokens and chat template."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.chat_template)
    text = tokenizer.backend_tokenizer.to_str() + repr(special)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_base_model(section: ModelSection, config: Any) -> str:
    """Return a hash that identifies the base model: of a local folder's weights and configuration, or the hub's commit.

    Args:
        section: the recipe's `model` section.
        config: the loaded configuration, which has the commit hash.
    """
    folder = Path(section.pretrained_model_name_or_path)
    digest = hashlib.sha256()
    if folder.is_dir():
        for file, sha256 in hash_files(sorted([*folder.glob("*.safetensors"), folder / "config.json"])).items():
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(sha256))
    else:
        commit = getattr(config, "_commit_hash", None) or section.revision or "main"
        digest.update(f"{section.pretrained_model_name_or_path}@{commit}".encode())
    return digest.hexdigest()


def hash_files(files: list[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file in hexadecimal. Threads hash in parallel, since hashing releases the GIL."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(files, threads.map(file_sha256, files), strict=True))


def combine_weight_hashes(sha256_by_file: dict[str, str]) -> str:
    """Return one hash over the hashes of the weights and the adapter configuration.

    Args:
        sha256_by_file: SHA-256 by file name, of a checkpoint's files; files of other kinds are ignored.
    """
    hashes = [(name, sha256_by_file[name]) for name in sorted(sha256_by_file) if _is_weight_file(name)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def stat_signature(file: Path) -> tuple[int, ...]:
    """Return a signature that changes when the file is written to."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_weight_file(name: str) -> bool:
    return name.endswith(".safetensors") or name == ADAPTER_CONFIG
