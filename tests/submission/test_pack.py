"""The submission folder: what is in it, that it gives our score and answers, and what is refused."""

import ast
import dataclasses
import functools
import http.server
import importlib.util
import json
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
from helpers import CHARACTERS, REPOSITORY, character_tokenizer, with_scores_times
from hypothesis import given
from hypothesis import strategies as st

from hw3.cli import main
from hw3.common.errors import RunFailed, UserError
from hw3.config.recipe import load_recipe
from hw3.data.prompt import Prompt
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import Encoder
from hw3.evaluation.selection import scored_checkpoint
from hw3.generation.output_limits import AnswerLengths
from hw3.submission.grader_encoding import encode_as_grader
from hw3.submission.output_agreement import compare_answers, own_answers
from hw3.submission.pack import TEMPLATES, fill_python, fill_shell, prompt_settings, reduced_config
from hw3.submission.verify import _read_otherwise

FILES = [
    "README.md",
    "adapter_checkpoint/adapter_config.json",
    "adapter_checkpoint/adapter_model.safetensors",
    "download.sh",
    "predict.py",
    "prediction.json",
    "run.sh",
    "utils.py",
]


def hw3(*words: object, expected: int = 0) -> None:
    assert main([str(word) for word in words]) == expected


def module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def packed(scored_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed for 2024, with answers to three rows that have no output."""
    folder = tmp_path_factory.mktemp("packed")
    rows = [{"id": row.id, "instruction": row.instruction} for row in read_rows(scored_run.parent / "eval.json")[:2]]
    rows.append({"id": "typed", "instruction": "甲<eos>乙"})
    (folder / "private.json").write_text(json.dumps(rows), encoding="utf-8")
    hw3("pack", scored_run, "--for", "2024", "--input", folder / "private.json", "--out", folder / "pack")
    return folder / "pack"


def test_the_folder_holds_what_the_course_asks_and_nothing_else(packed: Path, scored_run: Path) -> None:
    files = sorted(path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file())
    assert files == FILES
    assert sorted(path.name for path in packed.parent.iterdir()) == ["pack", "private.json"]
    best = json.loads((scored_run / "eval/eval/results.json").read_text())["best"]
    weights = "adapter_checkpoint/adapter_model.safetensors"
    assert (packed / weights).read_bytes() == (
        scored_run / best["checkpoint"] / "adapter_model.safetensors"
    ).read_bytes()
    for file in FILES:
        if not file.endswith(".safetensors"):
            text = (packed / file).read_text(encoding="utf-8")
            # Where it was made is nobody's business, and nothing of hw3 is needed to run it.
            assert str(scored_run.parent) not in text and "import hw3" not in text and "from hw3" not in text
    readme = (packed / "README.md").read_text(encoding="utf-8")
    assert f"{best['mean_perplexity']:.3f}" in readme and "peft 0.13.0" in readme and "$" not in readme


def test_prediction_is_the_runs_own_answers(packed: Path, scored_run: Path, tmp_path: Path) -> None:
    answers = json.loads((packed / "prediction.json").read_text(encoding="utf-8"))
    hw3("predict", scored_run, packed.parent / "private.json", "--output", tmp_path / "own.json")
    assert answers == json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    assert [set(answer) for answer in answers] == [{"id", "output"}] * 3
    assert [answer["id"] for answer in answers] == ["row-100", "row-101", "typed"]


def test_utils_give_the_recipes_prompt_and_quantization(packed: Path) -> None:
    utils = module("packed_utils", packed / "utils.py")
    assert utils.get_prompt("甲{instruction}\\n") == "天地玄黃\n問：甲{instruction}\\n\n答："
    config = utils.get_bnb_config().to_dict()
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_compute_dtype"] == "float32"
    assert config["bnb_4bit_use_double_quant"] is True and config["load_in_4bit"] is True


def test_adapter_config_has_the_keys_of_2024_alone(packed: Path) -> None:
    known = json.loads((TEMPLATES / "peft-0.13.0.json").read_text(encoding="utf-8"))["keys"]
    config = json.loads((packed / "adapter_checkpoint/adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config) == known and len(known) == 24
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["base_model_name_or_path"] == "base"


def test_keys_that_must_go_are_refused_unless_at_their_default(scored_run: Path) -> None:
    path = scored_run / "checkpoint-4/adapter_config.json"
    config = json.loads(path.read_text())
    assert set(config) - set(reduced_config(config, "peft-0.13.0", path)) >= {"lora_bias", "peft_version", "use_qalora"}
    with pytest.raises(UserError) as refused:
        reduced_config(config | {"lora_bias": True, "init_lora_weights": "eva", "unheard_of": 1}, "peft-0.13.0", path)
    unknown = "peft==0.13.0 does not know this key, so only its default"
    assert refused.value.problems == [
        f"{path}: lora_bias: found true: {unknown} (false) can be packed",
        f"{path}: unheard_of: found 1: {unknown} (null) can be packed",
        f'{path}: init_lora_weights: found "eva": peft==0.13.0 cannot load such an adapter onto a quantized base',
    ]


def test_mistakes_write_nothing(
    scored_run: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        capsys.readouterr()
        hw3("pack", *words, expected=2)
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "exists already, and nothing is written over it" in refused(scored_run, "--out", packed)
    assert "no complete checkpoint 5; there are checkpoint-4" in refused(scored_run, "--checkpoint", "5", "--out", out)
    assert "an http(s) address is needed" in refused(scored_run, "--url", "ftp://x", "--out", out)
    assert "no such file" in refused(scored_run, "--input", tmp_path / "none.json", "--out", out)
    assert "no such run" in refused(tmp_path / "none", "--out", out)
    unscored = shutil.copytree(scored_run, tmp_path / "unscored")
    shutil.rmtree(unscored / "eval")
    assert "score the run first: make eval" in refused(unscored, "--out", out)
    assert list(tmp_path.iterdir()) == [unscored]


def test_full_fine_tuning_has_nothing_to_pack(
    mini_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    hw3("train", mini_recipe, "--run", run, "quantization=null", "lora=null", "training.max_steps=4")
    hw3("eval", run)
    hw3("pack", run, "--out", tmp_path / "out", expected=2)
    assert "full fine-tuning has no adapter" in capsys.readouterr().err


def test_another_score_than_the_runs_is_not_packed(
    scored_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_scores_times(scored_run, tmp_path / "run", 1.001)
    hw3("pack", run, "--out", tmp_path / "out", expected=1)
    said = capsys.readouterr().err
    assert "relative difference 1.0e-03, at most 0.0001 in float32; not packed" in said
    assert list(tmp_path.iterdir()) == [run]


def test_rows_that_the_grader_reads_otherwise_are_named(scored_run: Path, tmp_path: Path) -> None:
    rows = [{"id": str(number), "instruction": text, "output": "乙"} for number, text in enumerate(["甲", "甲<eos>"])]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    scored = scored_checkpoint(scored_run)
    assert _read_otherwise(scored, character_tokenizer()) == ""
    scored = dataclasses.replace(scored, data=tmp_path / "rows.json")
    explained = _read_otherwise(scored, character_tokenizer())
    assert explained == "\n1 rows spell a special token, which the grader takes for the token itself: 1"


def test_other_answers_than_ours_are_not_packed(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = scored_checkpoint(scored_run)
    rows = read_rows(scored.data)
    own, _ = own_answers(scored, rows, scored.data)
    assert compare_answers(scored, rows, own, own.texts) == "answers: 10 of 10 equal to hw3 predict's"
    others = [*own.texts[:-1], own.texts[-1][:1] + "甲"]
    with pytest.raises(RunFailed, match=r"9 of 10 equal to hw3 predict's; not packed. The first that differs: row-109"):
        compare_answers(scored, rows, own, others)

    # In 16 bits an answer may part from ours at a near tie, and nowhere else.
    run = shutil.copytree(scored_run, tmp_path / "run")
    half = load_recipe(run / "recipe.yaml", ["model.dtype=bfloat16"])
    (run / "recipe.yaml").write_text(half.to_yaml(), encoding="utf-8")
    scored = dataclasses.replace(scored, run=run, recipe=half)
    found = r"9 of 10 equal to hw3 predict's, 1 part from them where two tokens were at most (\d+\.\d+) nats apart"
    with pytest.raises(RunFailed, match=f"{found} in bfloat16, more than 1.0: row row-109; not packed") as refused:
        compare_answers(scored, rows, own, others)
    gap = float(re.search(found, str(refused.value))[1])
    monkeypatch.setattr("hw3.submission.output_agreement.NEAR_TIE", gap + 0.01)
    assert re.match(f"answers: {found} in bfloat16$", compare_answers(scored, rows, own, others))


CHAT = (
    "{{ bos_token }}{% for m in messages %}<eos>{{ m['role'] }}：{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<eos>答：{% endif %}"
)
PROMPTS = [
    Prompt(system="天地", turn="問：{instruction}\n答："),
    Prompt(turn="{instruction}"),
    Prompt(system=' "玄\\n黃" ', turn=" {instruction} "),
    Prompt(system="天地 ", turn=" 問：{instruction}", chat_template=True),
    Prompt(turn="{instruction}\n", chat_template=True),
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
@given(text=st.text(alphabet=CHARACTERS + " {}\"'\\", min_size=1))
def test_the_grader_reads_get_prompt_as_training_did(prompt: Prompt, text: str, mini_base: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT
    encoder = Encoder(tokenizer, prompt)
    before, after = encoder.text_around_turn()
    turn = prompt.turn.replace("{instruction}", text)
    values: dict = {}
    constants = {"BEFORE": before, "TURN": prompt.turn, "AFTER": after, "CHAT_TEMPLATE": prompt.chat_template}
    exec(fill_python("utils.py", constants | {"QUANTIZATION": None}), values)
    assert values["get_prompt"](text) == before + (turn.strip() if prompt.chat_template else turn) + after
    encoded = encode_as_grader(tokenizer, Row("1", text, "甲"), values["get_prompt"](text))
    assert encoded.prompt_ids == encoder.prompt_ids(text)
    assert values["get_bnb_config"]() is None


def test_prompt_settings_are_the_recipes(mini_recipe: Path) -> None:
    settings = prompt_settings(load_recipe(mini_recipe, ["quantization=null"]), character_tokenizer())
    assert settings == {
        "BEFORE": "天地玄黃\n",
        "TURN": "問：{instruction}\n答：",
        "AFTER": "",
        "CHAT_TEMPLATE": False,
        "QUANTIZATION": None,
    }


def test_answers_may_be_as_long_as_ours(packed: Path, scored_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(packed)
    try:
        predict = module("packed_predict", packed / "predict.py")
    finally:
        sys.modules.pop("utils", None)
    lengths = AnswerLengths(
        read_rows(scored_run.parent / "train.json"), Encoder(character_tokenizer(), Prompt(turn="{instruction}"))
    )
    for characters in range(1, 200):
        assert predict.limit("甲" * characters) == lengths.limit("甲" * characters)


@pytest.mark.parametrize("name", ["utils.py", "predict.py"])
def test_templates_are_python_3_10(name: str) -> None:
    ast.parse((TEMPLATES / name).read_text(encoding="utf-8"), feature_version=(3, 10))


def test_an_odd_run_sh_call_says_how(packed: Path) -> None:
    done = subprocess.run(["bash", "run.sh", "x"], cwd=packed, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: bash run.sh BASE_MODEL" in done.stderr


@pytest.fixture
def server(packed: Path) -> Iterator[str]:
    """The packed adapter on the web."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(packed / "adapter_checkpoint"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_download_checks_and_fetches(packed: Path, server: str, tmp_path: Path) -> None:
    def download() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"no_proxy": "127.0.0.1"}
        return subprocess.run(["bash", "download.sh"], cwd=tmp_path, capture_output=True, text=True, env=environment)

    script = (packed / "download.sh").read_text(encoding="utf-8")
    (tmp_path / "download.sh").write_text(script, encoding="utf-8")
    shutil.copytree(packed / "adapter_checkpoint", tmp_path / "adapter_checkpoint")
    assert (download().returncode, download().stdout) == (0, "adapter_checkpoint: there, and whole\n")
    weights = tmp_path / "adapter_checkpoint/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert download().returncode == 1 and "has no address to fetch it from" in download().stderr

    hashes = dict(re.findall(r"^(SHA256_\w+)=(\w+)$", script, re.MULTILINE))
    (tmp_path / "download.sh").write_text(fill_shell("download.sh", hashes | {"URL": server}), encoding="utf-8")
    done = download()
    assert (done.returncode, done.stdout) == (0, "adapter_checkpoint: fetched, and whole\n"), done.stderr
    assert weights.read_bytes() == (packed / "adapter_checkpoint/adapter_model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_checkpoint", "download.sh"]

    shutil.rmtree(tmp_path / "adapter_checkpoint")
    other = hashes | {"URL": server, "SHA256_WEIGHTS": "0" * 64}
    (tmp_path / "download.sh").write_text(fill_shell("download.sh", other), encoding="utf-8")
    done = download()
    assert done.returncode == 1 and "is not the adapter that was packed" in done.stderr
    assert not (tmp_path / "adapter_checkpoint").exists()


def test_kept_check_in_the_course_environment_is_sound() -> None:
    kept = json.loads((REPOSITORY / "docs/pack/course_environment.json").read_text(encoding="utf-8"))
    assert kept["there"]["transformers"] == "4.45.1" and kept["there"]["peft"] == "0.13.0"
    assert kept["keys_of_peft"] == json.loads((TEMPLATES / "peft-0.13.0.json").read_text(encoding="utf-8"))["keys"]
    assert {row["model"] for row in kept["rows"]} == {"llama", "gemma2"}
    for row in kept["rows"]:
        assert row["relative_difference"] < 1e-4 and row["equal_answers"] == row["answers"] > 0


@pytest.mark.slow
def test_in_the_course_environment(tmp_path: Path) -> None:
    python = os.environ.get("HW3_COURSE_PYTHON")
    if python is None:
        pytest.skip("HW3_COURSE_PYTHON: the python of an environment with transformers 4.45.1 and peft 0.13.0")
    command = [sys.executable, REPOSITORY / "tools/check_pack.py", "--python", python, "--out", tmp_path / "check.json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0
    kept = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert [row["equal_answers"] for row in kept["rows"]] == [row["answers"] for row in kept["rows"]]
