"""Name the Makefile's nearest variable, or the recipe's key, for variables that the Makefile does not have.

The Makefile calls this script before anything is installed, so it needs only the standard library:
`PYTHONPATH=. python tools/suggest_variable.py UNKNOWN ... -- KNOWN ...`
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path

from hw3.config.common_names import COMMON_NAMES

FIELDS_FILE = Path(__file__).parents[1] / "hw3/config/library_fields.json"


def suggest(name: str, known: list[str]) -> str:
    """Return the end of a message: the nearest known variable, or how to set a recipe's key of this name."""
    upper, lower = name.upper(), name.lower()
    if upper in known:
        return f"did you mean {upper}?"
    fields = json.loads(FIELDS_FILE.read_text(encoding="utf-8"))
    training, lora = fields["SFTConfig"], fields["LoraConfig"]
    data = ["dev", "max_length", "too_long"]
    sections = {"data": data, "training": training, "lora": lora, "quantization": ["load_in_4bit"]}
    for section, keys in sections.items():
        key = COMMON_NAMES[section].get(lower, lower if lower in keys else None)
        if key is not None:
            return f'did you mean SET="{key if "." in key else f"{section}.{key}"}=..."?'
    nearest = difflib.get_close_matches(upper, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else "`make help` lists them"


def main() -> None:
    """Print one line about all unknown variables."""
    separator = sys.argv.index("--")
    known = sys.argv[separator + 1 :]
    print("; ".join(f"{name}: no such variable, {suggest(name, known)}" for name in sys.argv[1:separator]))


if __name__ == "__main__":
    main()
