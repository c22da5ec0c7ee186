"""Draw a picture for each question of a study, from its runs.json and rows.npz.

    python tools/draw_study.py --folder outputs/study

The pictures are written to the same folder. `--folder docs/study` draws those of docs/study.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from study.analysis import Study
from study.figures import DPI, draw_all

from hw3.common.figures import save_figure


def main() -> int:
    """Write a PNG file for each picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("outputs/study"), help="folder of runs.json")
    folder = parser.parse_args().folder
    for name, figure in draw_all(Study(folder)).items():
        save_figure(figure, folder / f"{name}.png", DPI)
    return 0


if __name__ == "__main__":
    sys.exit(main())
