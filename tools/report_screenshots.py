"""Pictures of a report page in a real browser: wide and light, wide and dark, its answers, and on a phone.

    python tools/report_screenshots.py outputs/tiny-qlora/report.html docs/report

Needs a Chromium (Debian: `apt-get install chromium fonts-noto-cjk`). Only pages of sample rows belong in `docs/`.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
# A headless window is no narrower than 500 pixels and opens no page at a heading; a frame in it does both.
FRAME = (
    "<!DOCTYPE html><style>:root {{ color-scheme: light dark }} body {{ margin: {gap}px; display: flex; "
    "gap: {gap}px; background: #888 }} iframe {{ border: 0 }}</style>{frames}"
)


def shoot(
    browser: str,
    page: Path,
    picture: Path,
    parts: list[str],
    size: tuple[int, int],
    *,
    gap: int = 0,
    dark: bool = False,
) -> None:
    """One picture of some parts of a page side by side.

    Args:
        browser: name or path.
        page: the page.
        picture: where the picture goes.
        parts: fragments of the page's address, "" for its top.
        size: width and height of each, in pixels.
        gap: pixels between them and around.
        dark: whether the reader prefers dark pages.
    """
    width, height = size
    frames = "".join(
        f'<iframe src="{page.resolve().as_uri()}{part}" width="{width}" height="{height}"></iframe>' for part in parts
    )
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(FRAME.format(gap=gap, frames=frames), encoding="utf-8")
        window = f"--window-size={gap + len(parts) * (width + gap)},{height + 2 * gap}"
        options = [*QUIET, *([DARK] if dark else []), f"--user-data-dir={folder}/profile", window]
        command = [browser, *options, f"--screenshot={picture.resolve()}", frame.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(f"{picture}: {picture.stat().st_size / 1024:.0f} kB")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--browser", default="chromium", help="name or path")
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    arguments = parser.parse_args()
    browser, page, folder = arguments.browser, arguments.page, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    shoot(browser, page, folder / "light.png", [""], (1000, 1500))
    shoot(browser, page, folder / "dark.png", ["#prompting"], (1000, 1000), dark=True)
    shoot(browser, page, folder / "answers.png", ["#answers"], (1000, 1500))
    shoot(browser, page, folder / "phone.png", ["", "#learning-curve", "#rows"], (360, 780), gap=16)


if __name__ == "__main__":
    main()
