"""`make lock`: the versions that people and CI install, and the oldest ones that pyproject.toml admits.

    constraints/lock.txt     the newest of everything on the day it was made; what `make setup` installs
    constraints/oldest.txt   every library at the lower bound of pyproject.toml; what `make test-oldest` installs

Both are pip constraints for Python 3.11 to 3.13, resolved by uv from the package index, whichever platform runs it.
tests/test_lock.py holds them against pyproject.toml without a network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints" / "lock.txt"
OLDEST = ROOT / "constraints" / "oldest.txt"
PROJECT = "framefusion-aot"
EXTRA = "dev"
"""What `make demo` and `make test` install; it brings the extras export and gpu."""
LIBRARIES = ("", "export", "gpu", "tensorrt-rtx", "openvino", "signing", "server", "parquet")
"""The base install and the extras whose lower bounds are tested; what only tests need comes from the lock."""
OLDEST_PYTHON = "3.11"
BOUNDED_TOOLS = ("setuptools",)
"""What only tests need, but libraries bound from above: torch 2.11 wants setuptools below 82."""


def requirements(extra: str) -> Iterator[Requirement]:
    """Direct requirements of an extra, "": of the base install. Extras of this project that it names are followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) != PROJECT:
            yield requirement
            continue
        for other in sorted(requirement.extras):
            yield from requirements(other)


def pins(path: Path) -> list[Requirement]:
    """The lines of a constraints file, in its order."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def pinned(path: Path, name: str, python: str) -> str | None:
    """The version of a package for one Python on Linux x86-64; None where it has no pin."""
    system = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    machine = {"platform_machine": "x86_64", "platform_python_implementation": "CPython", "os_name": "posix"}
    for pin in pins(path):
        named = canonicalize_name(pin.name) == canonicalize_name(name)
        if named and (pin.marker is None or pin.marker.evaluate({**system, **machine})):
            return str(pin.specifier).removeprefix("==")
    return None


def oldest_requirements() -> list[str]:
    """Libraries as pyproject.toml bounds them, and what only tests need at the version of the lock."""
    libraries = [requirement for extra in LIBRARIES for requirement in requirements(extra)]
    names = {requirement.name for requirement in libraries}
    tools = [requirement for requirement in requirements(EXTRA) if requirement.name not in names]
    return [*map(str, libraries), *map(_from_lock, tools)]


def _from_lock(tool: Requirement) -> str:
    return str(tool) if tool.name in BOUNDED_TOOLS else f"{tool.name}=={pinned(LOCK, tool.name, OLDEST_PYTHON)}"


def resolve(wanted: Sequence[str], output: Path, header: str, *flags: str) -> None:
    """Write what uv finds for the requirements, under a header of our own: uv's would name this machine's paths.

    Raises:
        SystemExit: uv is missing, or finds no solution; it has said why.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", *flags, "-"]
    done = subprocess.run(command, input="\n".join(wanted), stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{output.name} stays as it is: uv ended with {done.returncode}")
    output.write_text(f"{header}{done.stdout}", encoding="utf-8")


def lock(torch: str) -> None:
    """Make both files.  torch: the version that people and CI install, a build for the CPU exists of it."""
    LOCK.parent.mkdir(exist_ok=True)
    wanted = [str(requirement) for extra in ("", EXTRA) for requirement in requirements(extra)]
    header = f"# Made by `make lock` with torch {torch}: what `make setup` installs, Python 3.11 to 3.13.\n"
    resolve([*wanted, f"torch=={torch}"], LOCK, header, "--universal", "--python-version", "3.11")
    header = (
        f"# Made by `make lock`: the lower bounds of pyproject.toml, for `make test-oldest`, Python {OLDEST_PYTHON}.\n"
    )
    flags = ("--resolution", "lowest-direct", "--python-version", OLDEST_PYTHON, "--python-platform", "linux")
    resolve(oldest_requirements(), OLDEST, header, *flags)


def show_installed() -> None:
    """Print the version of each direct requirement, so that the log of a run says what it ran with."""
    printed: set[str] = set()
    for requirement in [*requirements(""), *requirements(EXTRA)]:
        if requirement.name in printed:
            continue
        printed.add(requirement.name)
        try:
            print(f"{requirement.name} {version(requirement.name)}")
        except PackageNotFoundError:
            print(f"{requirement.name} is not installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="2.13.0", help="the version of torch to lock (default: %(default)s)")
    parser.add_argument("--installed", action="store_true", help="print what is installed here, and lock nothing")
    arguments = parser.parse_args()
    if arguments.installed:
        show_installed()
    else:
        lock(arguments.torch)


if __name__ == "__main__":
    main()
