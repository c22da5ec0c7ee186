"""Layouts of training documents: the labels and separators around the texts of a pair.

A pair is written as: before, label, after, text, break, before, label, after, translation; then a separator or EOS.
"""

from __future__ import annotations

DIRECTED_LABELS = [  # of a Classical and of a modern text
    ("文言文", "白話文"),
    ("文言", "白話"),
    ("古文", "今譯"),
    ("古文", "現代漢語"),
    ("文言文", "現代漢語"),
    ("古", "今"),
    ("文言", "語體"),
    ("古語", "今語"),
]
PLAIN_LABELS = [  # of a text and of its translation, in both directions
    ("原文", "譯文"),
    ("輸入", "輸出"),
    ("問", "答"),
    ("甲", "乙"),
    ("句", "譯"),
    ("題", "解"),
    ("Q", "A"),
    ("原句", "改寫"),
]
FORMS = [  # before, after, break, separator
    ("", "：", "\n", "\n"),
    ("", "：", "\n", "\n\n"),
    ("", "：\n", "\n", "\n\n"),
    ("【", "】", "\n", "\n"),
    ("", ": ", "\n", "\n"),
]
BARE_FORMS = [("", "", "\n", "\n"), ("", "", "\n", "\n\n")]

# Kinds of label in a document: none, naming the language, neutral, and random characters of the corpus.
BARE, DIRECTED, PLAIN, RANDOM = range(4)
