"""The authors' functions, run out of a clone of their repository without installing it.

Their modules import what this comparison does not need (training frameworks, readers of films), so single functions are
compiled from the file, with the few names that they use.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FOLDER = Path(os.environ.get("AUTHORS", Path(__file__).parents[2] / ".authors"))
"""Where `make test-authors` clones to."""


class Repository(NamedTuple):
    """Where the authors' code is, and the commit that the table of docs/families.md was made with."""

    owner: str
    name: str
    commit: str

    def required(self) -> None:
        """Skip the module where there is no clone."""
        if not (FOLDER / self.name).is_dir():
            reason = f"github.com/{self.owner}/{self.name} is not in {FOLDER}: `make test-authors` clones it"
            pytest.skip(reason, allow_module_level=True)

    def file(self, path: str) -> Path:
        """A file of the clone."""
        found = FOLDER / self.name / path
        assert found.is_file(), f"{path} is not in the clone of {self.name}: check out {self.commit}"
        return found

    def functions(self, path: str, names: tuple[str, ...], needed: Mapping[str, Any]) -> dict[str, Any]:
        """These functions of a file, by name; `needed` is what they find in their module."""
        tree = ast.parse(self.file(path).read_text())
        wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
        assert {node.name for node in wanted} == set(names), f"{path} has changed: {names} are looked for"
        for node in wanted:  # their types are of modules that are not imported
            node.returns = None
            node.decorator_list = []
            for argument in (*node.args.args, *node.args.kwonlyargs):
                argument.annotation = None
        space = dict(needed)
        exec(compile(ast.Module([*wanted], []), path, "exec"), space)
        return space

    def sentence(self, path: str, name: str, values: Mapping[str, Any]) -> str:
        """The f-string that a file assigns to a variable somewhere, with these values."""
        for node in ast.walk(ast.parse(self.file(path).read_text())):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.JoinedStr):
                continue
            if ast.unparse(node.targets[0]) == name:
                return str(eval(compile(ast.Expression(node.value), path, "eval"), dict(values)))
        raise AssertionError(f"{path} assigns no text to {name}")


INTERNVL = Repository("OpenGVLab", "InternVL", "2410d1dbf208f0e799459aff9376e5747dbf41a2")
LLAVA = Repository("LLaVA-VL", "LLaVA-NeXT", "df179663ae8b83207df100a1f7af24caec633ff9")
MINICPM = Repository("OpenBMB", "MiniCPM-V", "0dbb566de090067266abb76e702fb289f09934c5")
VILA = Repository("NVlabs", "VILA", "b760c34b9487fd736b4075f5111fbef3d80a37e9")
REPOSITORIES = (INTERNVL, LLAVA, MINICPM, VILA)

if __name__ == "__main__":  # for the Makefile: owner, name and commit of each
    for repository in REPOSITORIES:
        print(*repository)
