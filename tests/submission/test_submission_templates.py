"""The files of a submission work on their own: utils.py, predict.py, run.sh and download.sh."""

import ast
import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from helpers import character_tokenizer
from tokenizers import AddedToken

from hw3.data.prompt import Prompt
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.generation.output_limits import OutputLengthLimits
from hw3.submission.fill_templates import TEMPLATES_DIR, fill_shell_template


def load_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_predict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load `predict.py`, which imports the `utils.py` beside it."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "utils", raising=False)
    try:
        return load_module("submission_predict", folder / "predict.py")
    finally:
        sys.modules.pop("utils", None)


def test_utils_returns_the_recipes_prompt_and_quantization(submission_dir: Path) -> None:
    utils = load_module("submission_utils", submission_dir / "utils.py")
    assert utils.get_prompt("甲{instruction}\\n") == "天地玄黃\n問：甲{instruction}\\n\n答："
    config = utils.get_bnb_config().to_dict()
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_compute_dtype"] == "float32"
    assert config["bnb_4bit_use_double_quant"] is True and config["load_in_4bit"] is True


def test_predict_limits_outputs_as_hw3_predict_does(
    submission_dir: Path, scored_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = load_predict(submission_dir, monkeypatch)
    encoder = Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    limits = OutputLengthLimits(read_rows(scored_run.parent / "train.json"), encoder)
    for characters in range(1, 200):
        assert predict.limit("甲" * characters) == limits.get_max_new_tokens("甲" * characters)


def test_predict_encodes_typed_added_tokens_as_hw3_predict_does(
    submission_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = load_predict(submission_dir, monkeypatch)
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([AddedToken("甲乙", normalized=False), AddedToken("\n。", normalized=False)])
    texts = ["甲乙", "甲<eos>乙", "甲", "\n。"]
    encoder = Encoder(tokenizer, Prompt(system="天地玄黃", turn="問：{instruction}\n答："))
    assert predict.encode_prompts(tokenizer, texts) == [encoder.encode_prompt(text) for text in texts]
    assert encoder.encode_prompt("甲乙")[8:10] == [4, 5]
    assert predict.encode_prompts(tokenizer, texts[2:3]) == [encoder.encode_prompt("甲")]
    # The tokenizer itself is not changed: outputs keep added tokens that are not special.
    assert tokenizer.decode([36], skip_special_tokens=True) == "甲乙"


@pytest.mark.parametrize("name", ["utils.py", "predict.py"])
def test_templates_are_python_3_10(name: str) -> None:
    ast.parse((TEMPLATES_DIR / name).read_text(encoding="utf-8"), feature_version=(3, 10))


def test_run_sh_with_wrong_arguments_prints_its_usage(submission_dir: Path) -> None:
    process = subprocess.run(["bash", "run.sh", "x"], cwd=submission_dir, capture_output=True, text=True)
    assert process.returncode == 2 and "usage: bash run.sh BASE_MODEL" in process.stderr


@pytest.fixture
def adapter_url(submission_dir: Path) -> Iterator[str]:
    """Serve the submitted adapter over HTTP and return the URL."""

    class QuietHandler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(QuietHandler, directory=str(submission_dir / "adapter_checkpoint"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_download_sh_downloads_and_verifies_the_adapter(submission_dir: Path, adapter_url: str, tmp_path: Path) -> None:
    def download() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"no_proxy": "127.0.0.1"}
        return subprocess.run(["bash", "download.sh"], cwd=tmp_path, capture_output=True, text=True, env=environment)

    script = (submission_dir / "download.sh").read_text(encoding="utf-8")
    (tmp_path / "download.sh").write_text(script, encoding="utf-8")
    shutil.copytree(submission_dir / "adapter_checkpoint", tmp_path / "adapter_checkpoint")
    assert (download().returncode, download().stdout) == (0, "adapter_checkpoint: complete\n")
    weights = tmp_path / "adapter_checkpoint/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert download().returncode == 1 and "has no URL to download it from" in download().stderr

    hashes = dict(re.findall(r"^(SHA256_\w+)=(\w+)$", script, re.MULTILINE))
    filled = fill_shell_template("download.sh", hashes | {"URL": adapter_url})
    (tmp_path / "download.sh").write_text(filled, encoding="utf-8")
    process = download()
    assert (process.returncode, process.stdout) == (0, "adapter_checkpoint: downloaded, complete\n"), process.stderr
    assert weights.read_bytes() == (submission_dir / "adapter_checkpoint/adapter_model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_checkpoint", "download.sh"]

    shutil.rmtree(tmp_path / "adapter_checkpoint")
    wrong = fill_shell_template("download.sh", hashes | {"URL": adapter_url, "SHA256_WEIGHTS": "0" * 64})
    (tmp_path / "download.sh").write_text(wrong, encoding="utf-8")
    process = download()
    assert process.returncode == 1 and "are not the packed adapter (SHA-256 differs)" in process.stderr
    assert not (tmp_path / "adapter_checkpoint").exists()
