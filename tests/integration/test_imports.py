"""What importing the project does and does not do."""

import subprocess
import sys

from helpers import REPOSITORY


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)


def test_import_turns_telemetry_off() -> None:
    done = run_python(
        "import hw3.training.trainer; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    assert done.stdout == "True\n"


def test_scoring_imports_neither_pandas_nor_matplotlib_and_pauses_the_garbage_collector() -> None:
    """Each has hundreds of files. Without them scoring starts within seconds; the plot is drawn when all is scored."""
    done = run_python("""
import gc, sys
from hw3.common.gc_control import gc_paused
with gc_paused():
    assert not gc.isenabled()
    import hw3.evaluation.evaluate
assert gc.isenabled()
import pyarrow
from hw3.evaluation.results import arrow_column
print(arrow_column(["甲", "b"], pyarrow.string()).to_pylist(), arrow_column([1, 2], pyarrow.int64()).to_pylist())
print(arrow_column([0.1, 2.5], pyarrow.float64()).to_pylist(), {"pandas", "matplotlib"} & sys.modules.keys())
""")
    assert done.stdout == "['甲', 'b'] [1, 2]\n[0.1, 2.5] set()\n", done.stderr
