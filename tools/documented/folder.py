"""The folder that a page's blocks are run in: what the page says is there, made of the tiny checkpoint.

Everything that pages share is made once: the bundle, the clips and their questions, the caches of the user.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.documented.pages import ROOT, Block

CHECKPOINT = ROOT / "tests" / "models" / "tiny_qwen2_vl"
CHECKPOINTS = ("CHECKPOINT", "path/to/Qwen2-VL-2B-Instruct", "path/or/ID")
"""Names of a checkpoint on the pages: here all of them are the tiny one."""
CLONE = ("framefusion", "export", "runtime", "tests", "tools", "examples", "Makefile")
"""Of the repository, as the pages are for readers in a clone."""
CLIPS = 10
CLIP = "clip_002.mp4"  # as README says, clip.mp4
ENGINE_CACHE = "cache/framefusion-aot/engines"
STILLS = ("a.png", "b.png", "photo.png")
FILMS = 2  # in the folder films


@dataclass(frozen=True)
class Shared:
    """What the folders of all pages are made from, below one folder."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of every block: the commands of this interpreter, caches of its own, no network, no colour."""
        programs = Path(sys.executable).parent
        return os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(self.root / "temporary"),
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "COLUMNS": "120",
        }

    def make(self) -> None:
        """The clips and the bundle, by the commands that the pages name."""
        for name in ("home", "temporary", ENGINE_CACHE):
            (self.root / name).mkdir(parents=True)
        clips = (sys.executable, "-m", "tools.tiny.make_clips", "--count", str(CLIPS), "--out", self.root / "clips")
        build = ("ff-export", "build", CHECKPOINT, "-o", self.root / "bundle", "--json")
        for command in (clips, build):
            subprocess.run(command, cwd=ROOT, env=self.environment, check=True, capture_output=True)
        for name in STILLS:
            self._still(self.root / name)

    def folder_for(self, page: str, blocks: Sequence[Block]) -> Path:
        """A fresh folder with all that the page's blocks may name."""
        folder = self.root / "pages" / page.replace("/", "-").removesuffix(".md")
        folder.mkdir(parents=True)
        for name in CLONE:
            if (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)
        for name in CHECKPOINTS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(CHECKPOINT)
        (folder / "cache").mkdir()
        (folder / "cache" / "engines").symlink_to(self.root / ENGINE_CACHE)
        (folder / "demo-out").mkdir()
        shutil.copytree(self.root / "clips", folder / "demo-out" / "clips")
        shutil.copytree(self.root / "clips", folder, dirs_exist_ok=True)
        shutil.copy(self.root / "clips" / CLIP, folder / "clip.mp4")
        (folder / "films").mkdir()
        for number in range(FILMS):
            shutil.copy(self.root / "clips" / f"clip_{number:03d}.mp4", folder / "films")
        (folder / "question.txt").write_text("What happens?\n", encoding="utf-8")
        for name in STILLS:
            shutil.copy(self.root / name, folder / name)
        if not builds_its_bundle(blocks):
            shutil.copytree(self.root / "bundle", folder / "bundle")
        return folder

    def _still(self, file: Path) -> None:
        """The first frame of the clip."""
        import av

        with av.open(str(self.root / "clips" / CLIP)) as film:
            frame: Any = next(film.decode(video=0))
            frame.to_image().save(file)


def builds_its_bundle(blocks: Sequence[Block]) -> bool:
    """Whether the first that a page does with `bundle` is to build it: then it is not there before."""
    run = "\n".join(block.text for block in blocks if block.reason is None and block.language in ("shell", "console"))
    first = re.search(r"^.*?(?<![\w/-])bundle(?![\w/-]).*$", run.replace("\\\n", " "), re.MULTILINE)
    return first is not None and re.search(r"\b(?:plan|build)\b.*(?:-o) bundle", first[0]) is not None
