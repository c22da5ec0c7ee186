"""Convert the saved state of one AdamW to that of another."""

from __future__ import annotations

from typing import Any

import torch


def as_states_of(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An AdamW's saved state in the words of another AdamW with float32 states; unchanged where they agree.

    Args:
        optimizer: the one that will load it: PyTorch's or bitsandbytes'.
        state: what the other one's `state_dict` returned.
    """
    # bitsandbytes wraps its tensors once more when saving.
    flat = {
        key: {**values, **values.get("__bnb_optimizer_quant_state__", {})} for key, values in state["state"].items()
    }
    saved = next(iter(flat.values()), {})
    to_bnb = type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("bitsandbytes")
    if ("state1" in saved) == to_bnb or "qmap1" in saved:
        return state
    words = {"state1": "exp_avg", "state2": "exp_avg_sq"}
    if not to_bnb:
        words = {old: new for new, old in words.items()}
    states = {
        key: {
            "step": int(values["step"]) if to_bnb else torch.tensor(float(values["step"])),
            **{new: values[old] for new, old in words.items()},
        }
        for key, values in flat.items()
    }
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "params": old["params"], "lr": old["lr"]}
        for group, old in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {"state": states, "param_groups": groups}
