"""Take screenshots of a report page in a browser: light, dark, its predictions, on a phone, and in Chinese.

    python tools/report_screenshots.py outputs/tiny-qlora/report.html docs/report --chinese outputs/zh/report.html

Needs Chromium (Debian: `apt-get install chromium fonts-noto-cjk`). Only pages of the sample rows belong in `docs/`.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

HEADLESS_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
DARK_OPTION = "--blink-settings=preferredColorScheme=0"
# A headless window is at least 500 pixels wide and cannot open a page at a heading. A frame inside it can do both.
FRAME_PAGE = (
    "<!DOCTYPE html><style>:root {{ color-scheme: light dark }} body {{ margin: {gap}px; display: flex; "
    "gap: {gap}px; background: #888 }} iframe {{ border: 0 }}</style>{frames}"
)


def take_screenshot(
    browser: str,
    page: Path,
    image: Path,
    fragments: list[str],
    size: tuple[int, int],
    *,
    gap: int = 0,
    dark: bool = False,
) -> None:
    """Write one image of parts of a page, side by side.

    Args:
        browser: its name or path.
        page: the HTML file.
        image: the file to write.
        fragments: URL fragments of the parts; "" is the top of the page.
        size: width and height of each part, in pixels.
        gap: pixels between and around the parts.
        dark: whether the browser prefers the dark color scheme.
    """
    width, height = size
    frames = "".join(
        f'<iframe src="{page.resolve().as_uri()}{fragment}" width="{width}" height="{height}"></iframe>'
        for fragment in fragments
    )
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(FRAME_PAGE.format(gap=gap, frames=frames), encoding="utf-8")
        window = f"--window-size={gap + len(fragments) * (width + gap)},{height + 2 * gap}"
        options = [*HEADLESS_OPTIONS, *([DARK_OPTION] if dark else []), f"--user-data-dir={folder}/profile", window]
        command = [browser, *options, f"--screenshot={image.resolve()}", frame.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(f"{image}: {image.stat().st_size / 1024:.0f} kB")


def main() -> None:
    """Take all screenshots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--browser", default="chromium", help="name or path; default: chromium")
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("folder", type=Path, help="folder for the images")
    parser.add_argument("--chinese", type=Path, metavar="FILE", help="the same report with --lang zh-TW")
    arguments = parser.parse_args()
    browser, page, folder = arguments.browser, arguments.page, arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    take_screenshot(browser, page, folder / "light.png", [""], (1000, 1500))
    take_screenshot(browser, page, folder / "dark.png", ["#prompting"], (1000, 1000), dark=True)
    take_screenshot(browser, page, folder / "predictions.png", ["#predictions"], (1000, 1500))
    take_screenshot(browser, page, folder / "phone.png", ["", "#learning-curve", "#rows"], (360, 780), gap=16)
    if arguments.chinese is not None:
        take_screenshot(browser, arguments.chinese, folder / "chinese.png", [""], (1000, 1200))


if __name__ == "__main__":
    main()
