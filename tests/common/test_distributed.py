"""Sharding of work, comparison of what processes read, and messages for failures that no argument caused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.distributed import (
    assert_same_across_ranks,
    explain_runtime_errors,
    gather_objects,
    process_group,
    shard_by_cost,
)
from hw3.common.errors import RunError, UserError


@given(costs=st.lists(st.floats(1, 100), max_size=40), processes=st.integers(1, 5))
def test_shard_by_cost_deals_each_item_once_and_balances_costs(costs: list[float], processes: int) -> None:
    shards = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(processes))
        for rank in range(processes):
            patch.setenv("RANK", str(rank))
            shards.append(shard_by_cost(costs))
    assert sorted(index for shard in shards for index in shard) == list(range(len(costs)))
    sums = [sum(costs[index] for index in shard) for shard in shards]
    assert max(sums) - min(sums) <= max(costs, default=0) + 1e-9


def test_gather_objects_returns_the_value_of_a_single_process_and_raises_its_user_error() -> None:
    with process_group():
        assert gather_objects("a") == ["a"]
        with pytest.raises(UserError, match="wrong"):
            gather_objects(UserError("wrong"))
    assert not torch.distributed.is_initialized()


def test_assert_same_across_ranks_names_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [{"outputs/a": "step 8", "data": "1f"}, {"outputs/a": "no checkpoint", "data": "1f"}]
    monkeypatch.setattr("hw3.common.distributed.gather_objects", lambda value: read)
    with pytest.raises(UserError, match=r"\noutputs/a: process 1 reads no checkpoint, process 0 reads step 8$"):
        assert_same_across_ranks(read[0])


def test_explain_runtime_errors_adds_the_advice_when_memory_runs_out() -> None:
    with (
        pytest.raises(RunError, match="out of memory: no space\nset a smaller batch"),
        explain_runtime_errors("set a smaller batch"),
    ):
        raise torch.OutOfMemoryError("no space\nmore")


def test_explain_runtime_errors_explains_lost_processes_only() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/pair.cc:5] Connection closed by peer [::1]:1. This is typical.")
    with pytest.raises(RuntimeError, match=r"pair\.cc"), explain_runtime_errors(""):
        raise gloo
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        message = r"to continue\. \(Connection closed by peer \[::1\]:1\)$"
        with pytest.raises(RunError, match=message), explain_runtime_errors(""):
            raise gloo
        with pytest.raises(RunError, match="to continue"), explain_runtime_errors(""):
            raise torch.distributed.DistBackendError("NCCL error: remote process exited")
        with pytest.raises(RuntimeError, match="size mismatch"), explain_runtime_errors(""):
            raise RuntimeError("size mismatch")
