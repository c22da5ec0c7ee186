"""The line of progress in training: the rate of the last steps, and the time left."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from hw3.common.console import configure_logging
from hw3.training.callbacks import PeakMemoryCallback, ProgressLineCallback

TOKENS_PER_STEP = 1000


def train_with_clock(
    monkeypatch: pytest.MonkeyPatch, *, resumed_from: int = 0, logging_steps: int = 10, is_first_process: bool = True
) -> None:
    """Call the callback as the Trainer does, in a run to step 40. The first step takes 100 s, further ones 0.5 s."""
    configure_logging(logging.INFO)
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    state = TrainerState(
        max_steps=40,
        global_step=resumed_from,
        num_input_tokens_seen=resumed_from * TOKENS_PER_STEP,
        is_world_process_zero=is_first_process,
    )
    arguments: Any = SimpleNamespace(disable_tqdm=False)
    control = TrainerControl()
    callback = ProgressLineCallback()
    callback.on_train_begin(arguments, state, control)
    for step in range(resumed_from + 1, 41):
        now += 0.5 if step > resumed_from + 1 else 100.0
        state.global_step = step
        state.num_input_tokens_seen += TOKENS_PER_STEP
        callback.on_step_end(arguments, state, control)
        if step % logging_steps == 0:
            callback.on_log(arguments, state, control, logs={"loss": 2.0, "learning_rate": 1e-4})
        if step == 20:
            now += 5.0  # a checkpoint is saved
    callback.on_log(arguments, state, control, logs={"train_loss": 2.0})
    callback.on_train_end(arguments, state, control)


def test_progress_line_gives_the_rate_of_the_last_steps_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_with_clock(monkeypatch)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 10/40, loss 2.0000, lr 1.00e-04, 2,000 tokens/s, 00:15 left",
        "step 20/40, loss 2.0000, lr 1.00e-04, 2,000 tokens/s, 00:10 left",
        "step 30/40, loss 2.0000, lr 1.00e-04, 1,000 tokens/s, 00:07 left",
        "step 40/40, loss 2.0000, lr 1.00e-04, 2,000 tokens/s",
    ]


def test_progress_line_of_a_resumed_run_does_not_count_earlier_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_with_clock(monkeypatch, resumed_from=25)
    assert capsys.readouterr().err.splitlines()[0] == "step 30/40, loss 2.0000, lr 1.00e-04, 2,000 tokens/s, 00:05 left"


def test_progress_line_of_the_first_step_has_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_with_clock(monkeypatch, logging_steps=1)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "step  1/40, loss 2.0000, lr 1.00e-04"
    assert second == "step  2/40, loss 2.0000, lr 1.00e-04, 2,000 tokens/s, 00:19 left"


def test_only_the_first_process_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_with_clock(monkeypatch, is_first_process=False)
    assert capsys.readouterr().err == ""


def test_peak_memory_of_loading_is_recorded_before_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, arguments = [7, 9], SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: peaks[0])
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: peaks[1])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: peaks.__setitem__(slice(None), [1, 2]))
    callback = PeakMemoryCallback()
    callback.on_train_begin(arguments, TrainerState(), TrainerControl())
    assert callback.before_training == (7, 9) and callback.read() == (1, 2)


def test_progress_line_is_closed_after_training() -> None:
    closed: list[bool] = []
    callback: Any = ProgressLineCallback()
    callback._line = SimpleNamespace(close=lambda: closed.append(True))
    callback.on_train_end(SimpleNamespace(), TrainerState(), TrainerControl())
    assert closed == [True]


def test_progress_line_shows_the_last_score_and_leaves_scoring_out_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(logging.INFO)
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    state, control = TrainerState(max_steps=3, is_world_process_zero=True), TrainerControl()
    arguments: Any = SimpleNamespace(disable_tqdm=False)
    callback = ProgressLineCallback()
    callback.on_train_begin(arguments, state, control)
    for step in (1, 2, 3):
        now += 0.5
        state.global_step, state.num_input_tokens_seen = step, step * TOKENS_PER_STEP
        callback.on_step_end(arguments, state, control)
        callback.on_log(arguments, state, control, logs={"loss": 2.0, "learning_rate": 1e-4})
        now += 100.0
        callback.set_score(f"mean perplexity 6.000 at step {step}", seconds=100.0)
    callback.on_train_end(arguments, state, control)
    _, second, third = capsys.readouterr().err.splitlines()
    assert second == "step 2/3, loss 2.0000, lr 1.00e-04, 2,000 tokens/s, mean perplexity 6.000 at step 1, 01:40 left"
    assert third == "step 3/3, loss 2.0000, lr 1.00e-04, 2,000 tokens/s, mean perplexity 6.000 at step 2"
