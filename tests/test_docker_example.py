"""The image of examples/docker without Docker: what it copies and installs, what it starts, and its health check."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.specifiers import SpecifierSet

from tests.bundles import shared
from tests.patience import PATIENCE
from tests.wheel import NEVER_AT_RUN_TIME, ROOT, build_wheel

DOCKERFILE = ROOT / "examples" / "docker" / "Dockerfile"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
KEY = "secret"
# Libraries of this environment, without those that the image does not have.
PATHS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)
sys.meta_path.insert(0, Absent())
sys.path += {paths!r}
"""


def instructions() -> dict[str, list[str]]:
    """What each kind of line of the Dockerfile says, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    said: dict[str, list[str]] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, value = line.partition(" ")
            said.setdefault(name, []).append(" ".join(value.split()))
    return said


def test_what_is_copied_is_there_and_what_is_installed_is_what_was_copied() -> None:
    said = instructions()
    assert set(said) == {"FROM", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    for copied in said["COPY"]:
        *sources, target = copied.split()
        assert all((ROOT / source).exists() for source in sources), copied
        assert f"pip install --no-cache-dir '{target}[server]'" in said["RUN"][0]
    assert {"server"} <= PROJECT["optional-dependencies"].keys()


def test_its_python_is_one_that_the_package_takes() -> None:
    (image,) = instructions()["FROM"]
    found = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert found is not None
    assert found[1] in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {found[1]}" in PROJECT["classifiers"]


def test_who_runs_it_is_not_root_and_is_made_before() -> None:
    said = instructions()
    (user,) = said["USER"]
    assert user not in ("root", "0")
    assert re.search(rf"useradd .*\b{user}$", said["RUN"][0])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with this package's wheel, and its libraries but those that only builds need."""
    folder = tmp_path_factory.mktemp("image")
    home = folder / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    (site,) = home.glob("lib/python3*/site-packages")
    wheel = build_wheel(folder / "wheel")
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", str(wheel)], check=True)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "sitecustomize.py").write_text(PATHS.format(absent=NEVER_AT_RUN_TIME, paths=libraries))
    return home


@pytest.fixture(scope="module")
def container(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of what ENTRYPOINT starts, with the bundle in its place and the port that is free."""
    (entry,) = instructions()["ENTRYPOINT"]
    command = [str(shared("bundle")) if word == "/bundle" else word for word in json.loads(entry)]
    log = tmp_path_factory.mktemp("log") / "log"
    place = {"PATH": f"{installed / 'bin'}:/usr/bin:/bin", "HOME": str(log.parent), "FRAMEFUSION_API_KEY": KEY}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(installed / "bin" / command[0]), *command[1:], "--port", "0"],
            cwd=log.parent, env=place, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while (found := re.search(r"answers at http://[^/]*:(\d+)/v1", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield int(found[1])
        process.send_signal(signal.SIGTERM)  # as `docker stop` does
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_it_starts_without_what_builds_and_is_healthy(container: int, installed: Path) -> None:
    (check,) = instructions()["HEALTHCHECK"]
    _, _, command = check.partition("CMD ")
    (exposed,) = instructions()["EXPOSE"]
    python, *arguments = json.loads(command)
    assert f":{exposed}/" in arguments[-1]
    check_health = [
        str(installed / "bin" / python),
        *(argument.replace(f":{exposed}/", f":{container}/") for argument in arguments),
    ]
    assert subprocess.run(check_health, check=False, capture_output=True).returncode == 0
    nobody = [word.replace(f":{container}/", ":9/") for word in check_health]
    assert subprocess.run(nobody, check=False, capture_output=True).returncode != 0


@pytest.mark.slow
def test_it_answers_whoever_has_the_key(container: int) -> None:
    with urllib.request.urlopen(question(container, KEY), timeout=PATIENCE) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] > 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(question(container, "another"), timeout=PATIENCE)


def question(port: int, key: str) -> urllib.request.Request:
    body = {"messages": [{"role": "user", "content": "What happens?"}], "max_tokens": 3}
    return urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
