"""Count words and identifiers that the project no longer uses, each beside what replaced it in its prose and names."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

# Regular expressions for prose: comments, docstrings, messages and Markdown. A line break counts as a space.
WORDS = (
    r"worked examples?",
    r"un-?tuned",
    r"(?<!-)tuned",
    r"(go|goes|gone|going|went) on",
    r"(rows?|bits?|nats|tokens?|seconds?|s|ms|GiB|lines?|words?) an? "
    r"(step|character|token|row|GPU|process|checkpoint|second|batch|device|file)",
    r"captured (step|one)",
    r"packed",
    r"plain (weights|ones|model)",
    r"dequantized once",
    r"answer(s|ed|er)?",
    r"(says?|said|tells?|told|speaks?|spoken)",
    r"patience",
    r"(has|have|make|made|making|makes) room",
    r"torn",
    r"whole",
    r"kept",
    r"alone",
    r"at rest",
    r"of (its|their|his|our) own",
    r"to the (last )?bit",
    r"as (it|they) (is|are|comes?|stands?)",
    r"makes? (it|them) again",
    r"holds? (of|for)",
    r"for want of",
    r"at hand",
    r"heaviest",
    r"(is|are|be|was|were) to be had",
    r"upon which",
    r"in words",
)
# Identifiers of Python code; those that are ordinary words of many other programs are left out.
IDENTIFIERS = """
uncollected joined connect failures_named own_share check_same FIRST_PROCESS_SPEAKS PATIENCE LAST_WORDS tried NoBase
BadAdapter RunFailed one_file lines_are_meant recipe_of device_of attention_of holds scores_dequantized _make_room
_places torn rotate drop_old_state open_to_others data_facts portable gib _stamp Target Job Scored _joined_up _keep
tokens_that_fit choose_on drop_replaced heaviest check_head Figures Answerer Answer RoomyLayer ROOM _run_prompts SUMS
widths rows_at_once head_step LoraLinears OF_ONE_INPUT memory_of GAPS sharded_by as_states_of in_all like_steps FUSED
_plain_sums _drops_out _read_all before_completing Unseen Groups fault skeletons spell certain brief
"""

_PROSE_TOKENS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}


def count_replaced_words(checkout: Path, source_folders: tuple[str, ...]) -> dict[str, int]:
    """Count the uses of `WORDS` and `IDENTIFIERS` in a checkout's Python and Markdown files.

    Args:
        checkout: The repository's folder.
        source_folders: Its folders with Python code.

    Returns:
        The number of uses of each word that is used, by regular expression; of each identifier, by `name (identifier)`.
    """
    prose, names = [], []
    for folder in source_folders:
        for path in sorted((checkout / folder).rglob("*.py")):
            if path.stem.removeprefix("test_") == Path(__file__).stem:
                continue  # this file and its test
            for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
                if token.type in _PROSE_TOKENS:
                    prose.append(re.sub(r"\s+(# )?", " ", token.string))
                elif token.type == tokenize.NAME:
                    names.append(token.string)
    for path in sorted([*checkout.glob("*.md"), *(checkout / "docs").rglob("*.md")]):
        prose.append(re.sub(r"\s+", " ", path.read_text(encoding="utf-8")))
    text = "\n".join(prose)
    counts = {word: len(re.findall(rf"\b(?:{word})\b", text, re.IGNORECASE)) for word in WORDS}
    counts |= {f"{name} (identifier)": names.count(name) for name in IDENTIFIERS.split()}
    return {word: count for word, count in counts.items() if count}
