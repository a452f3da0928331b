"""Which pip command adds an extra, by where this package came from (PEP 610)."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from framefusion.installation import install_command
from tests.wheel import ROOT


class Installed:
    """A distribution, as far as its origin goes."""

    def __init__(self, record: str | None) -> None:
        self._record = record

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._record


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(record: dict[str, Any] | str | None, **settings: bool) -> str:
        text = record if isinstance(record, str) or record is None else json.dumps(record)
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Installed(text))
        return install_command("export", **settings)

    return made


@pytest.mark.parametrize("record", [None, "", "{", "[]", '{"dir_info": {}}'])
def test_from_an_index_it_is_named(command: Any, record: str | None) -> None:
    assert command(record) == "pip install 'framefusion-aot[export]'"
    assert command(record, upgrade=True) == "pip install -U 'framefusion-aot[export]'"


def test_a_clone_is_installed_from_its_folder(command: Any, tmp_path: Path) -> None:
    clone = tmp_path / "it's a clone"
    clone.mkdir()
    for editable, flag in ((True, ["-e"]), (False, [])):
        found = command({"url": clone.as_uri(), "dir_info": {"editable": editable}})
        assert shlex.split(found) == ["pip", "install", *flag, f"{clone}[export]"]


def test_a_repository_on_this_disk_is_installed_from_its_folder(command: Any, tmp_path: Path) -> None:
    """pip takes no name beside git+file://."""
    record = {"url": tmp_path.as_uri(), "vcs_info": {"vcs": "git", "commit_id": "ab12"}}
    assert shlex.split(command(record)) == ["pip", "install", f"{tmp_path}[export]"]


def test_a_wheel_is_installed_from_its_file(command: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "framefusion_aot-0.1.0-py3-none-any.whl"
    wheel.touch()
    record = {"url": wheel.as_uri(), "archive_info": {"hash": "sha256=00"}}
    assert shlex.split(command(record)) == ["pip", "install", f"{wheel}[export]"]
    wheel.unlink()
    assert command(record) == "pip install 'framefusion_aot-0.1.0-py3-none-any.whl[export]' where that wheel is"


def test_a_clone_that_is_gone_is_to_be_made_again(command: Any, tmp_path: Path) -> None:
    record = {"url": (tmp_path / "gone").as_uri(), "dir_info": {}}
    assert command(record) == "pip install '.[export]' in a clone of its repository"


@pytest.mark.parametrize(
    ("record", "url"),
    [
        (
            {
                "url": "https://host/x.git",
                "vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": "ab12"},
            },
            "git+https://host/x.git@ab12",
        ),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "ab"}, "subdirectory": "y"},
            "git+https://host/x.git@ab#subdirectory=y",
        ),
        ({"url": "https://host/a-1-py3-none-any.whl", "archive_info": {}}, "https://host/a-1-py3-none-any.whl"),
    ],
)
def test_what_came_over_the_network_comes_from_there_again(command: Any, record: dict[str, Any], url: str) -> None:
    *pip, requirement = shlex.split(command(record))
    assert pip == ["pip", "install"]
    parsed = Requirement(requirement)
    assert (parsed.name, parsed.extras, parsed.url) == ("framefusion-aot", {"export"}, url)


def test_what_was_never_installed_is_installed_from_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Installed:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert shlex.split(install_command("gpu")) == ["pip", "install", "-e", f"{ROOT}[gpu]"]
