"""A made-up corpus in the layout of the public one, and functions that build from it."""

import json
import lzma
import random
from pathlib import Path

from hw3.cli import main

SURNAMES = "赵钱孙李周吴郑王冯陈"
PLACES = ["东门", "南山", "西湖", "北原", "旧城", "长桥", "古寺", "江楼", "海市", "孤村"]
DEEDS = [
    ("生携酒出{}，遇故人于道，遂同醉而忘归", "先生带着酒走出{}，在路上遇到老朋友，两人一同喝醉，忘了回家"),
    ("翁老矣，犹日至{}观奕，不问胜负", "老翁年纪大了，还是每天到{}看人下棋，从不问谁输谁赢"),
    ("氏之子好学，借书{}，雪夜步行三十里", "家的儿子喜欢读书，到{}借书，雪夜里走了三十里路"),
    ("公治{}，去其苛令，岁余而流民皆返", "大人治理{}，废除了苛刻的法令，一年后流民都回来了"),
]
SMALL_SPLITS = ["--train", "60", "--dev", "10", "--test", "10", "--private", "10"]


def make_pairs() -> list[tuple[str, str]]:
    """Return 400 pairs without near duplicates: random characters between the clauses keep the pairs apart."""
    rng = random.Random(0)
    pool = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉天地玄黄宇宙洪荒日月盈昃列张寒来暑往秋收冬藏"
    pairs = []
    for surname in SURNAMES:
        for place in PLACES:
            for deed in DEEDS:
                fillers = ["".join(rng.sample(pool, 6)) for _ in range(4)]
                classical, modern = (f"{surname}{side.format(place)}".split("，") for side in deed)
                pairs.append(
                    tuple(
                        "，".join(f"{filler}，{clause}" for filler, clause in zip(fillers, side, strict=False)) + "。"
                        for side in (classical, modern)
                    )
                )
    return pairs


PAIRS = make_pairs()
CHAPTERS = {"古事/卷一": slice(0, 200), "新书/上/第二": slice(200, 400)}


def clone_files() -> dict[str, bytes]:
    """Return the files of a clone: a chapter with all files, one without bitext.txt, and one that is not aligned."""
    files = {}
    for chapter, part in CHAPTERS.items():
        pairs = PAIRS[part]
        files[f"双语数据/{chapter}/source.txt"] = "".join(f"{c}\n" for c, _ in pairs)
        files[f"双语数据/{chapter}/target.txt"] = "".join(f"{m}\n" for _, m in pairs)
        if chapter.endswith("卷一"):
            files[f"双语数据/{chapter}/bitext.txt"] = "".join(f"古文：{c}\n现代文：{m}\n\n" for c, m in pairs)
        files[f"双语数据/{chapter}/数据来源.txt"] = "https://example.org\n"
    files["双语数据/新书/坏/source.txt"] = "一行。\n两行。\n"
    files["双语数据/新书/坏/target.txt"] = "只有一行。\n"
    files["README.md"] = "语料\n"
    return {name: text.encode() for name, text in files.items()}


def write_parts(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    """Write pairs as a folder with one `*.tsv.xz` part."""
    folder.mkdir(parents=True)
    text = "".join(f"书\t{classical}\t{modern}\n" for classical, modern in pairs)
    (folder / "pairs-00.tsv.xz").write_bytes(lzma.compress(text.encode()))
    return folder


def write_row_file(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    """Write (instruction, output) rows; a row without an output gets no such field. Ids are `<file stem>-<number>`."""
    records = [
        {"id": f"{path.stem}-{number}", "instruction": instruction} | ({} if output is None else {"output": output})
        for number, (instruction, output) in enumerate(rows)
    ]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def run_build(corpus: object, output: Path, *arguments: str, expected_status: int = 0) -> dict:
    """Run `hw3 data build` and return `data.json`; {} if the command is expected to fail."""
    assert main(["data", "build", "--corpus", str(corpus), "--output", str(output), *arguments]) == expected_status
    return json.loads((output / "data.json").read_text(encoding="utf-8")) if expected_status == 0 else {}


def removed_by_rule(report: dict) -> dict[str, int]:
    """Return the rules that removed pairs, and how many."""
    return {count["rule"]: count["removed"] for count in report["cleaning"] if count["removed"]}
