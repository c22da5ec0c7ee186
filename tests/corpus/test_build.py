"""`hw3 data build` on a corpus written for these tests, in the public one's folder layout."""

import io
import json
import lzma
import random
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from hw3.cli import main
from hw3.common.hashing import file_sha256
from hw3.corpus.dedup import (
    INSIDE,
    NEAR,
    NEARLY,
    SAME,
    Groups,
    Unseen,
    band_keys,
    compare_all,
    join_near_duplicates,
    similarity,
)
from hw3.corpus.filters import RULES, fault
from hw3.corpus.niutrans import read_corpus
from hw3.corpus.normalize import fold, script_of, skeletons, without_punctuation
from hw3.corpus.script_conversion import converter
from hw3.data.rows import read_rows
from hw3.data.templates import match

WHO = "赵钱孙李周吴郑王冯陈"
WHERE = ["东门", "南山", "西湖", "北原", "旧城", "长桥", "古寺", "江楼", "海市", "孤村"]
DEEDS = [
    ("生携酒出{}，遇故人于道，遂同醉而忘归", "先生带着酒走出{}，在路上遇到老朋友，两人一同喝醉，忘了回家"),
    ("翁老矣，犹日至{}观奕，不问胜负", "老翁年纪大了，还是每天到{}看人下棋，从不问谁输谁赢"),
    ("氏之子好学，借书{}，雪夜步行三十里", "家的儿子喜欢读书，到{}借书，雪夜里走了三十里路"),
    ("公治{}，去其苛令，岁余而流民皆返", "大人治理{}，废除了苛刻的法令，一年后流民都回来了"),
]
SMALL = ["--train", "60", "--dev", "10", "--test", "10", "--private", "10"]


def sentences() -> list[tuple[str, str]]:
    """400 pairs, no two near duplicates: what stands between their clauses keeps them apart."""
    rng = random.Random(0)
    pool = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉天地玄黄宇宙洪荒日月盈昃列张寒来暑往秋收冬藏"
    pairs = []
    for who in WHO:
        for where in WHERE:
            for deed in DEEDS:
                signs = ["".join(rng.sample(pool, 6)) for _ in range(4)]
                classical, modern = (f"{who}{side.format(where)}".split("，") for side in deed)
                pairs.append(
                    tuple(
                        "，".join(f"{sign}，{clause}" for sign, clause in zip(signs, side, strict=False)) + "。"
                        for side in (classical, modern)
                    )
                )
    return pairs


PAIRS = sentences()
CLONE_ONLY = {"古事/卷一": slice(0, 200), "新书/上/第二": slice(200, 400)}


def clone_files() -> dict[str, bytes]:
    """The files of a clone: one chapter with all three, one without bitext.txt, one that does not fit together."""
    files = {}
    for chapter, part in CLONE_ONLY.items():
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


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "Classical-Modern"
    for name, data in clone_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_parts(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    folder.mkdir(parents=True)
    text = "".join(f"书\t{classical}\t{modern}\n" for classical, modern in pairs)
    (folder / "pairs-00.tsv.xz").write_bytes(lzma.compress(text.encode()))
    return folder


def build(corpus: object, out: Path, *words: str, expected: int = 0) -> dict:
    assert main(["data", "build", "--corpus", str(corpus), "--out", str(out), *words]) == expected
    return json.loads((out / "data.json").read_text(encoding="utf-8")) if expected == 0 else {}


def removed(report: dict) -> dict[str, int]:
    return {line["rule"]: line["removed"] for line in report["cleaning"] if line["removed"]}


# ---------------------------------------------------------------------------------------------------------- sources


def test_a_clone_is_read_chapter_by_chapter(clone: Path) -> None:
    corpus = read_corpus(str(clone), None, clone)
    assert [(pair.classical, pair.modern) for pair in corpus.pairs] == PAIRS
    assert {pair.book for pair in corpus.pairs} == {"古事", "新书"}
    assert corpus.left_out == ["新书/坏: 2 lines in source.txt, 1 in target.txt"]
    assert read_corpus(str(clone / "双语数据"), None, clone).sha256 == corpus.sha256


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_an_archive_gives_the_same_pairs_and_is_held_to_its_checksum(clone: Path, tmp_path: Path, ending: str) -> None:
    archive = tmp_path / f"Classical-Modern-0123abc{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name, data in clone_files().items():
                file.writestr(f"Classical-Modern-0123abc/{name}", data)
    else:
        with tarfile.open(archive, "w:gz") as file:
            for name, data in clone_files().items():
                member = tarfile.TarInfo(f"Classical-Modern-0123abc/{name}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    sha256 = file_sha256(archive)
    assert read_corpus(str(archive), sha256, tmp_path).pairs == read_corpus(str(clone), None, tmp_path).pairs
    downloads = tmp_path / "downloads"
    fetched = read_corpus(archive.as_uri(), sha256.upper(), downloads)
    assert (fetched.sha256, len(fetched.pairs)) == (sha256, 400)
    assert [path.name for path in downloads.iterdir()] == [archive.name]
    archive.unlink()  # what has been fetched is not fetched again
    assert len(read_corpus(archive.as_uri(), sha256, downloads).pairs) == 400


def test_another_checksum_is_refused_and_nothing_is_kept(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in clone_files().items():
            file.writestr(name, data)
    build(archive.as_uri(), tmp_path / "out", "--sha256", "0" * 64, expected=2)
    said = capsys.readouterr().err
    assert f"its sha256 is {file_sha256(archive)}, --sha256 says {'0' * 64}" in said
    assert not any((tmp_path / "out").iterdir())
    report = build(archive.as_uri(), tmp_path / "out", *SMALL)
    assert f"sha256 {file_sha256(archive)}, not checked" in capsys.readouterr().err
    assert report["source"] == {
        "name": archive.as_uri(),
        "sha256": file_sha256(archive),
        "files": 7,
        "pairs": 400,
        "books": 2,
        "chapters_left_out": 1,
    }


@pytest.mark.parametrize(
    ("corpus", "words", "message"),
    [
        ("nowhere", [], "--corpus nowhere: no such folder, and no archive"),
        (".", [], "neither 双语数据/ nor *.tsv.xz there"),
        (".", ["--sha256", "00"], "--sha256 is the checksum of an archive; . is a folder"),
        ("file:///nowhere/a.zip", [], "--corpus file:///nowhere/a.zip: cannot be fetched"),
        ("https://example.org/page", [], "not the address of an archive"),
        ("torn.tar.gz", [], "torn.tar.gz: cannot be read"),
        ("empty", [], "bad.tsv.xz:2: 2 fields; three are needed"),
    ],
)
def test_a_corpus_that_cannot_be_had_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: str,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.tar.gz").write_bytes(b"\x1f\x8b\x08 torn")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/bad.tsv.xz").write_bytes(lzma.compress(b"a\tb\tc\na\tb\n"))
    build(corpus, tmp_path / "out", *words, expected=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_make_data_is_one_call() -> None:
    words = [
        "make",
        "-n",
        "--no-print-directory",
        "VENV=",
        "data",
        "CORPUS=parts",
        "EXCLUDE=a.json b.json",
        "OUT=there",
        "SHA256=00",
    ]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    said = " ".join(done.stdout.replace("\\\n", " ").split())
    assert said == "hw3 data build --corpus parts --sha256 00 --exclude a.json b.json --out there"


def test_without_a_corpus_it_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build"]) == 2
    assert "git clone --depth 1 https://github.com/NiuTrans/Classical-Modern" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ texts


def test_one_sentence_in_every_spelling_has_one_skeleton() -> None:
    simplified = "后面的干部了解里程表，乾坤着于谘议。"
    spellings = [simplified, *(converter(name)([simplified])[0] for name in ("s2tw", "hanziconv"))]
    assert spellings[2] == "後麵的乾部瞭解裏程錶，乾坤著於諮議。"
    assert len(set(spellings)) == 3
    assert set(skeletons(spellings)) == {"后面的干部了解里程表干坤着于咨议"}


@given(st.lists(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x2FA1F, exclude_categories=["Cs"]))))
def test_skeletons_are_folded_texts_without_punctuation(texts: list[str]) -> None:
    texts = [text.replace("\n", "") for text in texts]
    assert skeletons(texts) == [without_punctuation(fold(text)) for text in texts]


def test_scripts() -> None:
    assert {c: script_of(c) for c in "后天汉漢馀餘，a"} == {
        "后": None, "天": None, "汉": "simplified", "漢": "traditional", "馀": "simplified", "餘": "traditional",
        "，": None, "a": None,
    }  # fmt: skip


def test_conversions() -> None:
    assert converter("s2tw")(["他出了门。", "公元前后"]) == ["他出了門。", "公元前後"]
    assert converter("hanziconv")(["他出了门。"]) == ["他齣瞭門。"]
    assert converter("none")(["他出了门。"]) == ["他出了门。"]
    hanziconv = pytest.importorskip("hanziconv").HanziConv.toTraditional
    everything = "".join(map(chr, range(0x4E00, 0xA000)))
    assert converter("hanziconv")([everything]) == [hanziconv(everything)]


@pytest.mark.parametrize(
    ("classical", "modern", "rule"),
    [
        ("", "今天没有下雨。", "empty"),
        ("今日无□雨。", "今天没有下雨。", "odd characters"),
        ("今日无雨。", "今天没有 OK 下雨。", "odd characters"),
        ("泛舟氵垒水上。", "在氵垒水上划船。", "odd characters"),
        ("今日无雨。", "今日，無雨", "identical"),
        ("无雨。", "没有下雨。", "length"),
        ("今日无雨。" * 20, "今天没有下雨。" * 42 + "今天没下雨。", None),
        ("今日无雨。" * 20, "今天没有下雨。" * 43, "length"),
        ("今日无雨，明日亦无雨。", "今天明天。", "length ratio"),
        ("今日无雨。", "今天和明天都没有下雨，后天和大后天也没有。", "length ratio"),
        ("父胤之宋司空主簿也。", "自从两汉以来推举贤才都是这样。", "character overlap"),
        ("今日无雨。", "今天没有下雨。", None),
    ],
)
def test_each_rule(classical: str, modern: str, rule: str | None) -> None:
    found = fault(classical, modern, tuple(skeletons([classical, modern])))
    assert found == rule
    assert rule is None or rule in RULES


# -------------------------------------------------------------------------------------------------- near duplicates

CHARACTERS = st.sampled_from("天地玄黄宇宙洪荒")
TEXTS = st.lists(st.text(CHARACTERS, max_size=20) | st.text(st.sampled_from("天地"), max_size=24), max_size=12)


def test_similarity_is_jaccard_of_bigrams_with_the_ends() -> None:
    assert similarity("天地玄黄", "天地玄黄") == 1.0
    assert similarity("天地玄黄", "天地玄宇") == 3 / 7  # ^天 天地 地玄 of 7
    assert similarity("", "天") == 0.0


@given(TEXTS, TEXTS)
def test_the_search_finds_nothing_that_brute_force_does_not(unseen: list[str], texts: list[str]) -> None:
    """The other way round MinHash may miss a near duplicate, so only the rest must agree."""
    kinds = Unseen(unseen).copies(texts, band_keys(texts)).tolist() if texts else []
    for text, kind in zip(texts, kinds, strict=True):
        same = bool(text) and text in unseen
        inside = any(min(len(text), len(o)) >= 8 and (text in o or o in text) for o in unseen)
        inside |= any(text[at : at + 16] in o for o in unseen for at in range(len(text) - 15))
        nearly = any(o and similarity(text, o) >= NEAR for o in unseen)
        assert (kind == SAME) == same
        assert (kind == INSIDE) == (inside and not same)
        assert kind != NEARLY or nearly
    present = [o for o in unseen if o]
    found = compare_all(texts, present)["copies"] if present and texts else []
    assert {number for number, kind in enumerate(kinds) if kind} <= set(found)


def test_the_search_misses_few_near_duplicates() -> None:
    rng = random.Random(0)
    texts = ["".join(chr(0x4E00 + rng.randrange(2000)) for _ in range(30)) for _ in range(400)]
    changed = [text[:14] + "的" + text[15:] for text in texts]  # 29 of 33 bigrams in common: 0.88
    assert np.bincount(Unseen(texts).copies(changed, band_keys(changed))).tolist() == [0, 0, 0, 400]
    strangers = [text[::-1] for text in texts]
    assert not Unseen(texts).copies(strangers, band_keys(strangers)).any()


def test_a_long_run_in_common_makes_a_copy() -> None:
    run = "天地玄黄宇宙洪荒日月盈昃辰宿列张"
    texts = [f"甲乙丙丁戊己庚辛壬癸{run}子丑寅卯辰巳午未", f"甲乙丙丁戊己庚辛壬癸{run[1:]}子丑寅卯辰巳午未"]
    other = f"东西南北中发白春夏秋冬梅兰竹菊{run}金木水火土"
    assert Unseen([other]).copies(texts, band_keys(texts)).tolist() == [INSIDE, 0]
    assert compare_all(texts, [other])["copies"] == [0]


def test_groups_join_through_a_third_text() -> None:
    texts = ["天地玄黄宇宙洪荒日月盈昃", "天地玄黄宇宙洪荒日月盈", "地玄黄宇宙洪荒日月盈", "辰宿列张寒来暑往"]
    assert similarity(texts[0], texts[2]) < 0.7 < similarity(texts[0], texts[1])
    groups = Groups(4)
    join_near_duplicates(groups, texts, band_keys(texts))
    assert [groups.find(number) for number in range(4)] == [0, 0, 0, 3]


# ------------------------------------------------------------------------------------------------------------- rows


def test_a_build_has_the_homeworks_shape_and_is_the_same_every_time(clone: Path, tmp_path: Path) -> None:
    report = build(clone, tmp_path / "a", *SMALL)
    build(clone, tmp_path / "b", *SMALL)
    names = ["data.json", "dev.json", "private_test.json", "public_test.json", "train.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = build(clone, tmp_path / "c", *SMALL, "--seed", "1")
    assert other["splits"]["train"]["sha256"] != report["splits"]["train"]["sha256"]

    originals = set(converter("s2tw")([side for pair in PAIRS for side in pair]))
    seen: Counter[str] = Counter()
    for name, rows in (("train", 60), ("dev", 10), ("public_test", 10), ("private_test", 10)):
        read = read_rows(tmp_path / "a" / f"{name}.json", need_output=name != "private_test")
        assert len(read) == rows
        for row in read:
            template, text = match(row.instruction)
            assert text in originals
            seen[text] += 1
            if row.output is not None:
                assert row.output.removeprefix(template.answer_prefix) in originals
                seen[row.output.removeprefix(template.answer_prefix)] += 1
            else:
                assert name == "private_test"
        record = json.loads((tmp_path / "a" / f"{name}.json").read_text(encoding="utf-8"))[0]
        assert list(record) == ["id", "instruction", "output"][: 2 if name == "private_test" else 3]
    assert set(seen.values()) == {1}
    train = report["splits"]["train"]
    # Every slot comes three times, three of them a fourth time: 10 slots are modern to Classical, 9 the other way.
    assert train["m2c"] + train["c2m"] == 60 and 30 <= train["m2c"] <= 33
    assert report["splits"]["test"]["sha256"] == file_sha256(tmp_path / "a/public_test.json")
    assert report["clusters"] == {"pairs": 400, "clusters": 400, "pairs_with_near_duplicates": 0, "largest": 1}


def test_files_that_are_there_are_never_written_over(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dev.json").write_text("mine", encoding="utf-8")
    build(clone, tmp_path, *SMALL, expected=2)
    assert f"{tmp_path / 'dev.json'}: there already and never written over" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dev.json"]
    assert (tmp_path / "dev.json").read_text(encoding="utf-8") == "mine"


def test_near_duplicates_of_other_books_stay_in_one_split(tmp_path: Path) -> None:
    """Every pair has a twin with one character changed and another translation."""
    twins = [(classical[:-3] + "兮" + classical[-2:], f"又一种译法：{modern}") for classical, modern in PAIRS]
    report = build(write_parts(tmp_path / "corpus", [*PAIRS, *twins]), tmp_path / "out", *SMALL)
    assert report["clusters"] == {"pairs": 800, "clusters": 400, "pairs_with_near_duplicates": 800, "largest": 2}
    texts = {}
    for name in ("train", "dev", "public_test"):
        rows = read_rows(tmp_path / "out" / f"{name}.json")
        texts[name] = skeletons([side for row in rows for side in (match(row.instruction)[1], row.output)])
    for one, other in (("train", "dev"), ("train", "public_test"), ("dev", "public_test")):
        assert compare_all(texts[one], texts[other])["copies"] == []
    assert report["verified"]["train_against_evaluation"]["copies"] == 0


def test_every_rule_is_counted(tmp_path: Path) -> None:
    bad = [
        ("今日无□雨。", "今天没有下雨。"),
        ("今日无雨。", "今日，无雨。"),
        ("无。", "没有下雨。"),
        ("今日无雨。", "今天和明天都没有下雨，后天和大后天也没有。"),
        ("父胤之宋司空主簿也。", "自从两汉以来推举贤才都是这样。"),
        PAIRS[0],
        (PAIRS[1][0].replace("，", "、"), PAIRS[1][1]),
    ]
    report = build(write_parts(tmp_path / "corpus", [*PAIRS, *bad]), tmp_path / "out", *SMALL)
    assert removed(report) == {
        "odd characters": 1,
        "identical": 1,
        "length": 1,
        "length ratio": 1,
        "character overlap": 1,
        "duplicate": 2,
    }
    assert report["cleaning"][-1]["left"] == 400


def write_excluded(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    records = [
        {"id": str(number), "instruction": instruction} | ({} if output is None else {"output": output})
        for number, (instruction, output) in enumerate(rows)
    ]
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def test_excluded_sentences_are_in_no_row_in_either_script_nor_nearly(tmp_path: Path) -> None:
    hanziconv = converter("hanziconv")
    spelled = [tuple(hanziconv(pair)) for pair in PAIRS[:40]]
    rows = [(f"{classical}\n翻譯成現代文：", modern) for classical, modern in spelled[:10]]
    rows += [(f"文言文翻譯：\n{classical}", f"答案：{modern}") for classical, modern in spelled[10:20]]
    # Rows to predict: their sentence is excluded as well; words are others, more stands around it.
    changed = ["".join("唷" if at % 14 == 7 else c for at, c in enumerate(modern)) for _, modern in spelled[20:30]]
    rows += [(f"翻譯成文言文：\n{text}", None) for text in changed]
    rows += [(f"請看：{classical}完", None) for classical, _ in spelled[30:40]]
    excluded = write_excluded(tmp_path / "theirs.json", rows)
    corpus = write_parts(tmp_path / "corpus", PAIRS)
    report = build(corpus, tmp_path / "out", "--exclude", str(excluded), *SMALL[:1], "all", *SMALL[2:])
    assert removed(report) == {"excluded: same": 20, "excluded: near": 10, "excluded: inside": 10}
    assert sum(entry["rows"] for entry in report["splits"].values()) == 360
    assert report["excluded_files"] == [
        {"name": "theirs.json", "sha256": file_sha256(excluded), "rows": 40, "sentences": 60}
    ]
    assert report["verified"]["rows_against_excluded"]["copies"] == 0
    written = "".join((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("train.json", "dev.json"))
    for classical in converter("s2tw")([classical for classical, _ in PAIRS[:40]]):
        assert classical not in written
    # Counts and checksums only: nothing says which pair an excluded row came from.
    shown = (tmp_path / "out/data.json").read_text(encoding="utf-8")
    assert not any(side in shown for pair in [*PAIRS, *spelled] for side in pair)


def test_a_copy_that_the_search_missed_is_found_in_the_end_and_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excluded = write_excluded(tmp_path / "theirs.json", [(f"{c}\n翻譯成現代文：", m) for c, m in PAIRS[:200]])
    monkeypatch.setattr(Unseen, "copies", lambda self, texts, keys: np.zeros(len(texts), np.int8))
    report = build(write_parts(tmp_path / "corpus", PAIRS), tmp_path / "out", "--exclude", str(excluded), *SMALL)
    assert removed(report) == {}
    assert report["verified"]["found_and_drawn_anew"] > 20
    assert report["verified"]["rows_against_excluded"]["copies"] == 0
    texts = {match(row.instruction)[1] for row in read_rows(tmp_path / "out/train.json")}
    assert not texts & set(converter("s2tw")([side for pair in PAIRS[:200] for side in pair]))


def test_too_few_pairs_are_an_error_that_says_so(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(clone, tmp_path / "out", expected=2)
    said = capsys.readouterr().err
    assert (
        "400 different sentence pairs are left after cleaning, too few for 10,750 rows: the private split would" in said
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("conversion", "wording", "text"),
    [("none", "翻译成", "东门"), ("hanziconv", "將下麵句子", "東門"), ("s2tw", "將下面句子", "東門")],
)
def test_instructions_are_in_the_script_of_the_text(
    clone: Path, tmp_path: Path, conversion: str, wording: str, text: str
) -> None:
    build(clone, tmp_path / "out", "--convert", conversion, "--train", "300", *SMALL[2:])
    rows = read_rows(tmp_path / "out/train.json")
    everything = "".join(row.instruction for row in rows)
    assert wording in everything and text in everything
    assert all(match(row.instruction) for row in rows)


def test_hanziconv_that_is_not_installed_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hanziconv.charmap", None)
    build("nowhere", tmp_path / "out", "--convert", "hanziconv", expected=2)
    assert "pip install -c constraints.txt hanziconv" in capsys.readouterr().err


def test_several_processes_give_the_same_bytes(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    excluded = write_excluded(tmp_path / "theirs.json", [(f"{PAIRS[0][0]}\n翻譯成現代文：", PAIRS[0][1])])
    words = [*SMALL, "--exclude", str(excluded)]
    build(clone, tmp_path / "one", *words)
    monkeypatch.setattr("hw3.corpus.build._CHUNK", 300)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    build(clone, tmp_path / "two", *words)
    for name in ("train.json", "public_test.json", "data.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_audits_document_is_what_its_figures_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ahocorasick")
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    audit = __import__("audit_data")
    report = json.loads((REPOSITORY / "docs/data/audit.json").read_text(encoding="utf-8"))
    assert (REPOSITORY / "docs/data/audit.md").read_text(encoding="utf-8") == audit.document(report)
    assert sum(file["copies"] for file in report["files"].values()) == 0
    assert {name: file["sha256"] for name, file in report["files"].items()} == {
        entry["file"]: entry["sha256"] for entry in report["build"]["splits"].values()
    }
    assert [line["rule"] for line in report["build"]["cleaning"]] == list(RULES)
