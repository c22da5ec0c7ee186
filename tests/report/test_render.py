"""Escaping in HTML and Markdown: text of rows, recipes and paths never becomes markup."""

import base64
import hashlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from sample_runs import Page, SampleReport, write_and_read_report, write_predictions, write_run

from hw3.report.render import code_block, escape_markdown

HOSTILE = "<script>alert(1)</script></script>{{7*7}}{% raw %}\"'`|](javascript:x)<!--\u202eevil"
ESCAPED = HOSTILE.replace("\u202e", "\\u202e")
_PRINTABLE_TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Cf", "Zs", "Zl", "Zp")), min_size=1)


def test_hostile_text_stays_text() -> None:
    run = write_run(Path(f"outputs/{HOSTILE.replace('/', '_')}"), base=f"{HOSTILE}", marker=HOSTILE)
    write_predictions(run, "checkpoint-10", [HOSTILE] * 4)
    page, markdown = write_and_read_report(run)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("style") == 1
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "style", "action", "data", "xlink:href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href", "#") or "").startswith("#")
    assert f"row-1{ESCAPED}" in page.texts["h4"]
    assert any(f"今日無雨。{ESCAPED}\n" in text for text in page.texts["bdi"])
    assert any(f"你是翻譯。{ESCAPED}" in text for text in page.texts["code"])
    assert "\u202e" not in page.body and "\u202e" not in markdown
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    nodes = [child for token in tokens for child in [token, *(token.children or [])]]
    assert {node.content for node in nodes if node.type in ("html_inline", "html_block")} <= {"<br>"}
    assert not any("javascript" in str(value) for node in nodes for value in (node.attrs or {}).values())
    assert f"row-1{ESCAPED}" in "".join(node.content for node in nodes if node.type == "text")


def test_page_loads_nothing(page: Page, sample_report: SampleReport) -> None:
    html = (sample_report.folder / "outputs/a/report.html").read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    (policy,) = [dict(a)["content"] for tag, a in page.tags if dict(a).get("http-equiv") == "Content-Security-Policy"]
    digests = {
        kind: base64.b64encode(hashlib.sha256(page.texts[kind][0].encode()).digest()).decode()
        for kind in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )


@given(_PRINTABLE_TEXT)
def test_escape_markdown_shows_text_unchanged(text: str) -> None:
    (paragraph, inline, _) = MarkdownIt("commonmark").enable("table").parse(str(escape_markdown(text)))
    assert paragraph.type == "paragraph_open"
    assert "".join(child.content for child in inline.children or []) == text


@given(st.lists(st.sampled_from(["`", "```", "~~~", "text", "\n"])).map("".join))
def test_code_block_ends_where_its_text_does(text: str) -> None:
    (token,) = MarkdownIt("commonmark").parse(str(code_block(text)))
    assert token.type == "fence" and token.content == (text + "\n" if text else "\n")
