"""Refuses to build from a clone without symbolic links; all else about the package stands in pyproject.toml.

`framefusion.export` and `framefusion.runtime` are links to the two folders. Where git or an unpacker of archives makes
no links, their places hold small text files, and a wheel would be built without a word and without either of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

LINKS = ("export", "runtime")
TEXT = """
error: {names}: not the links to the top-level folders that they have to be, so what is
installed would lack framefusion.export and framefusion.runtime. This copy was made without symbolic links: by git with
core.symlinks=false, as on Windows outside of its developer mode, or by unpacking an archive. To mend it, delete what is
in their place, and then

    git config core.symlinks true
    git checkout {names}

or clone again: git clone -c core.symlinks=true URL. Without git, copies of the two folders in those places do as well.
"""

missing = [f"framefusion/{name}" for name in LINKS if not (Path("framefusion") / name / "__init__.py").is_file()]
if missing:
    sys.exit(TEXT.format(names=" ".join(missing)))
setup()
