"""Content hashes of base models, adapters and tokenizers."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hw3.common.hashing import file_sha256
from hw3.config.schema import ModelSection

if TYPE_CHECKING:  # the first checks of a command must not take the seconds of importing transformers
    from transformers import PreTrainedTokenizerBase

# File names of a PEFT adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Settings that are sets in PEFT's configurations, which writes them in any order.
_UNORDERED_SETTINGS = ("target_modules", "exclude_modules", "feedforward_modules")


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer's vocabulary, merges, special tokens and chat template."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.chat_template)
    text = tokenizer.backend_tokenizer.to_str() + repr(special)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_base_model(section: ModelSection) -> str:
    """Return a hash that identifies the base model: of a local folder's weights and configuration, or the hub's commit.

    Args:
        section: the recipe's `model` section; the configuration of a model from the hub has been loaded.
    """
    folder = Path(section.pretrained_model_name_or_path)
    digest = hashlib.sha256()
    if folder.is_dir():
        for file, sha256 in hash_files(sorted([*folder.glob("*.safetensors"), folder / "config.json"])).items():
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(sha256))
    else:
        from huggingface_hub import try_to_load_from_cache  # takes a third of a second

        # transformers 5.23 no longer stores the commit in the configuration; the cache's folder is named after it.
        cached = try_to_load_from_cache(str(folder), "config.json", revision=section.revision)
        commit = Path(cached).parent.name if isinstance(cached, str) else section.revision or "main"
        digest.update(f"{section.pretrained_model_name_or_path}@{commit}".encode())
    return digest.hexdigest()


def hash_files(files: list[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file in hexadecimal. Threads hash in parallel, since hashing releases the GIL.

    A file that this process has hashed is read again only if it was written to since.
    """
    with ThreadPoolExecutor() as threads:
        signatures = [stat_signature(file) for file in files]
        return dict(zip(files, threads.map(_hash_with_signature, files, signatures), strict=True))


@cache
def _hash_with_signature(file: Path, signature: tuple[int, ...]) -> str:
    return file_sha256(file)


def hash_adapter_config(content: bytes) -> str:
    """Return a hash of the settings in `adapter_config.json`, which does not depend on the order of its sets.

    Args:
        content: the file's bytes; if they are not a JSON object, the hash is that of the bytes.
    """
    try:
        settings = json.loads(content)
        for key in _UNORDERED_SETTINGS:
            if isinstance(settings.get(key), list):
                settings[key] = sorted(settings[key], key=str)
        content = json.dumps(settings, sort_keys=True).encode()
    except (ValueError, AttributeError, RecursionError):
        pass
    return hashlib.sha256(content).hexdigest()


def combine_weight_hashes(sha256_by_file: dict[str, str]) -> str:
    """Return one hash over the hashes of the weights and the adapter configuration.

    Args:
        sha256_by_file: SHA-256 by file name, of a checkpoint's files; files of other kinds are ignored. The hash of an
            adapter's configuration comes from `hash_adapter_config`.
    """
    hashes = [(name, sha256_by_file[name]) for name in sorted(sha256_by_file) if _is_weight_file(name)]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def stat_signature(file: Path) -> tuple[int, ...]:
    """Return a signature that changes when the file is written to."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _is_weight_file(name: str) -> bool:
    return name.endswith(".safetensors") or name == ADAPTER_CONFIG
