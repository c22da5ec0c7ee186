"""Convert the saved state of one AdamW implementation to that of another."""

from __future__ import annotations

from typing import Any

import torch

# Implementations of AdamW with float32 states. Their update is the same; they differ in memory and speed.
FUSED_ADAMW, PAGED_ADAMW = "adamw_torch_fused", "paged_adamw_32bit"
EQUIVALENT_ADAMW = {"adamw_torch", FUSED_ADAMW, PAGED_ADAMW}


def convert_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Convert an AdamW's saved state between PyTorch and bitsandbytes; both must have float32 states.

    Args:
        optimizer: the optimizer that will load the state, PyTorch's or bitsandbytes'.
        state: result of the saved optimizer's `state_dict`.

    Returns:
        The state under the names that `optimizer` uses; the same object if no conversion is needed.
    """
    # bitsandbytes 0.50.2 nests its tensors in one more dictionary when it saves them.
    values_by_parameter = {
        key: {**values, **values.get("__bnb_optimizer_quant_state__", {})} for key, values in state["state"].items()
    }
    saved = next(iter(values_by_parameter.values()), {})
    to_bnb = type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("bitsandbytes")
    if ("state1" in saved) == to_bnb or "qmap1" in saved:
        return state
    names = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    if not to_bnb:
        names = {old: new for new, old in names.items()}
    states = {
        key: {
            "step": int(values["step"]) if to_bnb else torch.tensor(float(values["step"])),
            **{new: values[old] for new, old in names.items()},
        }
        for key, values in values_by_parameter.items()
    }
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "params": old["params"], "lr": old["lr"]}
        for group, old in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {"state": states, "param_groups": groups}
