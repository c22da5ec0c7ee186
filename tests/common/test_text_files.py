"""Text files are read without their byte-order mark and otherwise unchanged."""

from pathlib import Path

import pytest

from hw3.common.errors import UserError
from hw3.common.text_files import read_utf8


def test_read_utf8_drops_the_byte_order_mark_and_changes_no_line_end(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf\xe9\x9b\xa8\r\n\rb\xe2\x80\xa8\n")
    assert read_utf8(file) == "雨\r\n\rb\u2028\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\xff\n", "2: invalid UTF-8: byte 0xff"),
        (b"\xef\xbb\xbfa\n\n\xa5", "3: invalid UTF-8: byte 0xa5"),
        (b"a\n\0", "2: found a NUL character"),
        ("雨".encode("utf-32"), "1: begins with the byte-order mark of UTF-16 or UTF-32"),
    ],
)
def test_read_utf8_names_the_line_of_a_wrong_byte(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}:{message}"):
        read_utf8(file)
