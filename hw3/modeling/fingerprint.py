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


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges and special tokens."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.chat_template)
    text = tokenizer.backend_tokenizer.to_str() + repr(special)
    return hashlib.sha256(text.encode()).hexdigest()


def stat_signature(file: Path) -> tuple[int, ...]:
    """What is another once a file has been written to."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def base_sha256(model: ModelSection, config: Any) -> str:
    """What the base is, by content: a hash of a local folder's weights and configuration, or the hub's commit.

    Args:
        model: the recipe's section.
        config: the loaded configuration, which knows the commit it came from.
    """
    folder = Path(model.pretrained_model_name_or_path)
    digest = hashlib.sha256()
    if folder.is_dir():
        for file, content in file_digests(sorted([*folder.glob("*.safetensors"), folder / "config.json"])).items():
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(content))
    else:
        commit = getattr(config, "_commit_hash", None) or model.revision or "main"
        digest.update(f"{model.pretrained_model_name_or_path}@{commit}".encode())
    return digest.hexdigest()


def file_digests(files: list[Path]) -> dict[Path, str]:
    """Hex SHA-256 of files, several at once: hashing lets go of the interpreter's lock."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(files, threads.map(file_sha256, files), strict=True))


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def weights_sha256(files: dict[str, str]) -> str:
    """One hash over the checksums of weights and adapter configuration.

    Args:
        files: sha256 by file name, of a checkpoint's files; others than those are passed over.
    """
    parts = [(name, files[name]) for name in sorted(files) if _is_weight(name)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors") or name == ADAPTER_CONFIG
