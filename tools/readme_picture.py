"""The picture in README: the page of a real answer, as Chromium draws it.

    python -m tools.readme_picture [--bundle BUNDLE --film FILM]

Without a bundle, the tiny trained checkpoint is built and asked about one of its clips, as README says.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "report.png"
CHECKPOINT = ROOT / "tests" / "models" / "tiny_qwen2_vl"
QUESTION = "Which way does the yellow object move?"
SIZE = (1080, 980)
COLOURS = 128  # of the palette: a page has few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="that answers; default: one built for this")
    parser.add_argument("--film", type=Path, help="that is shown; default: the clip of README")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (default: %(default)s)")
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium on PATH: apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = given.bundle or built(folder)
        film = given.film or clip(folder)
        page = folder / "report.html"
        shot = folder / "shot.png"
        run("ff-run", "view", bundle, "--video", film, "--prompt", QUESTION, "--cost", "0.3", "-o", page)
        run(
            chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--force-prefers-reduced-motion", "--virtual-time-budget=3000", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={shot}", page.as_uri(),
        )  # fmt: skip
        with Image.open(shot) as drawn:
            drawn.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(given.out, optimize=True)
    print(f"{given.out}: {given.out.stat().st_size / 1000:.0f} kB; look at it")


def built(folder: Path) -> Path:
    """A bundle of the tiny checkpoint."""
    run("ff-export", "build", CHECKPOINT, "-o", folder / "bundle")
    return folder / "bundle"


def clip(folder: Path) -> Path:
    """The clip that README asks about."""
    run(sys.executable, "-m", "tools.tiny.make_clips", "--count", 3, "--out", folder / "clips")
    return folder / "clips" / "clip_002.mp4"


def run(program: object, *arguments: object) -> None:
    """A command that has to work; ff-run and ff-export are those of this interpreter."""
    path = Path(sys.executable).parent / str(program)  # an absolute one stays itself
    command = [str(path if path.exists() else program), *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
