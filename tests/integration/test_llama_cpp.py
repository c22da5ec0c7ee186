"""`hw3 export --format gguf` with llama.cpp itself and SmolLM2-135M-Instruct, as `make smollm2` writes it.

llama.cpp is built from the source package of llama-cpp-python, once, into a cache folder: 20 minutes on two cores.
HW3_LLAMA_CPP names another folder, with the source package in `source` and the installed packages in `site`.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import REPOSITORY, SMOLLM2, train_smollm2_on_cpu
from transformers import AutoTokenizer, Gemma2Config

from hw3.common.errors import UserError
from hw3.config.schema import ModelSection
from hw3.data.prompt import Prompt
from hw3.data.rows import read_rows
from hw3.data.tokenization import Encoder
from hw3.export.gguf import GgufOptions, convert, convert_vocabulary
from hw3.export.gguf_check import check_tokens

PACKAGE = "llama-cpp-python==0.3.36"
CACHE = Path(os.environ.get("HW3_LLAMA_CPP", "~/.cache/hw3/llama-cpp-python-0.3.36")).expanduser()
CMAKE_ARGUMENTS = "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"needs {SMOLLM2}: make smollm2"),
]


def run_pip(*arguments: str | Path) -> None:
    """Run pip; skip the tests if it fails, for lack of a network or of a compiler."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CMAKE_ARGS": CMAKE_ARGUMENTS})
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be built: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The environment of programs that import llama-cpp-python, which is built first."""
    if not (CACHE / "site/llama_cpp").is_dir():
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        run_pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", CACHE, PACKAGE)
        (archive,) = CACHE.glob("*.tar.gz")
        with tarfile.open(archive) as package:
            package.extractall(CACHE, filter="data")
        archive.unlink()
        (unpacked,) = CACHE.glob("llama_cpp_python-*")
        unpacked.rename(CACHE / "source")
        packages = [CACHE / "source", "sentencepiece", "diskcache"]
        run_pip("install", "--no-deps", "--target", CACHE / "new", *packages)
        (CACHE / "new").rename(CACHE / "site")
    return os.environ | {"PYTHONPATH": f"{REPOSITORY}:{CACHE / 'site'}", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps of 4 rows, scored on 8 rows."""
    rows = json.loads((REPOSITORY / "data/eval.json").read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("llama_cpp")
    return train_smollm2_on_cpu(folder, rows[::18], "training.gradient_accumulation_steps=1", "training.save_steps=4")


@pytest.fixture(scope="module")
def exported(run: Path, environment: dict[str, str]) -> tuple[Path, str]:
    """The exported folder with an f16 file, and what the command printed."""
    command = [sys.executable, "-m", "hw3", "export", run, "--format", "gguf", "--llama-cpp", CACHE / "source"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return run.with_name("run-export"), done.stdout


@pytest.fixture(scope="module")
def q8_0_file(exported: tuple[Path, str], environment: dict[str, str]) -> Path:
    """The exported model with 8-bit weights."""
    folder, _ = exported
    output = folder.with_name("model-q8_0.gguf")
    model = ModelSection(pretrained_model_name_or_path=str(SMOLLM2), dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        options = GgufOptions("q8_0", CACHE / "source/vendor/llama.cpp")
        return convert(folder, output, options, AutoTokenizer.from_pretrained(folder), model, [])


def check_gguf(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools/check_gguf.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_exported_gguf_scores_as_the_checkpoint(exported: tuple[Path, str]) -> None:
    folder, stdout = exported
    assert {"Modelfile", "run-export-f16.gguf", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert (folder / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./run-export-f16.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\n' in (folder / "Modelfile").read_text(encoding="utf-8")
    assert "mean perplexity of these 8 rows" in stdout and "of at most 0.01" in stdout


def test_both_types_have_the_tokens_of_all_wordings_and_scores_within_their_bounds(
    run: Path, exported: tuple[Path, str], q8_0_file: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    files = [exported[0] / "run-export-f16.gguf", q8_0_file]
    done = check_gguf(environment, *files, "--run", run, "--output", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [(entry["setting"], entry["wordings"], entry["prompts"]) for entry in entries] == [
        ("f16", 17, 8),
        ("q8_0", 17, 8),
    ]
    assert entries[0]["largest_difference_nats_per_token"] < entries[1]["largest_difference_nats_per_token"]


def test_a_file_that_rounds_more_than_its_name_says_fails(
    run: Path, q8_0_file: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    file = shutil.copy(q8_0_file, tmp_path / "model-f16.gguf")
    done = check_gguf(environment, file, "--run", run)
    assert done.returncode == 1 and "of at most 0.01" in done.stdout


def test_a_file_that_adds_no_bos_fails_before_it_is_scored(
    run: Path, q8_0_file: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    file = shutil.copy(q8_0_file, tmp_path / "model-q8_0.gguf")
    script = CACHE / "source/vendor/llama.cpp/gguf-py/gguf/scripts/gguf_set_metadata.py"
    command = [sys.executable, script, "--force", file, "tokenizer.ggml.add_bos_token", ""]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    done = check_gguf(environment, file, "--run", run)
    assert done.returncode == 1 and "mean perplexity" not in done.stdout
    assert "llama.cpp makes other tokens of the prompt" in done.stderr and "from token 0 on" in done.stderr


def test_gemma_gets_the_sentencepiece_file_of_its_base_and_the_same_tokens(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small vocabulary with the settings of Gemma's. transformers saves it without the file that llama.cpp needs."""
    sentencepiece = pytest.importorskip("sentencepiece")
    rows = read_rows(REPOSITORY / "data/eval.json")
    (tmp_path / "text.txt").write_text("\n".join(f"{row.instruction}\n{row.output}" for row in rows), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=1800, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, character_coverage=0.98,
        normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
        eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    base = tmp_path / "base"
    Gemma2Config(vocab_size=1800, architectures=["Gemma2ForCausalLM"]).save_pretrained(base)
    (tmp_path / "tokenizer.model").rename(base / "tokenizer.model")
    tokens = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **tokens}
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base)
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    options = GgufOptions("f16", CACHE / "source/vendor/llama.cpp")
    model = ModelSection(pretrained_model_name_or_path=str(base), dtype="float32")
    (tmp_path / "converted").mkdir()
    file = convert_vocabulary(tmp_path / "converted", options, tokenizer, model)
    assert not (tmp_path / "converted/model/tokenizer.model").exists()
    check_tokens(file, Encoder(tokenizer, Prompt(system="天地", turn="USER：{instruction}\nASSISTANT：")), rows)
    (base / "tokenizer.model").unlink()
    (tmp_path / "refused").mkdir()
    with pytest.raises(UserError, match=r"File not found: tokenizer\.model; put it into the base model's folder"):
        convert_vocabulary(tmp_path / "refused", options, tokenizer, model)
