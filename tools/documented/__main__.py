"""Run every command and every piece of Python that the pages show, each page in a fresh folder, as a reader would.

    python -m tools.documented                    every page; the exit code is 1 where something failed
    python -m tools.documented docs/using.md      these pages
    python -m tools.documented --list             what would be run, and what is not, with the reasons

A block fails where a command or an import does, or where a command does not print what the page shows. How pages are
written so that this works stands in CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.documented.folder import Shared
from tools.documented.output import missing_line
from tools.documented.pages import ROOT, RUN, Block, PageError, blocks_of, pages

LIMIT_S = 1200  # of one block, which hangs then
TYPED = "What happens?\n/tokens\n"  # by the reader, where a command reads what is typed
GIVEN = ("model", "inputs")  # names that a page's Python may take as given: tools/documented/given.py
TAIL = 25  # lines of a failure that are shown


@dataclass(frozen=True)
class Outcome:
    """What became of a block that was run."""

    block: Block
    seconds: float
    problem: str | None = None


def main() -> int:
    arguments = parse()
    started = time.monotonic()
    try:
        chosen = {page: blocks for page in arguments.pages or pages() if (blocks := runnable(page))}
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.list:
        for blocks in chosen.values():
            print(*(described(block) for block in blocks), sep="\n")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="documented-"))
    try:
        shared = Shared(folder)
        shared.make()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            outcomes = [
                outcome
                for found in pool.map(lambda blocks: run_page(shared, blocks), chosen.values())
                for outcome in found
            ]
    finally:
        if arguments.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    left_out = [block for blocks in chosen.values() for block in blocks if block.reason is not None]
    return summed_up(outcomes, left_out, time.monotonic() - started)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=lambda name: Path(name).resolve(), help="default: all")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--keep", action="store_true", help="leave the folders of the pages, and say where")
    parser.add_argument("--jobs", type=int, default=2, help="pages at a time; default: 2")
    return parser.parse_args()


def runnable(page: Path) -> list[Block]:
    """The blocks that a reader may run."""
    return [block for block in blocks_of(page) if block.language in RUN]


def described(block: Block) -> str:
    state = "run" if block.reason is None else f"not run: {block.reason}"
    return f"{block.place} {block.language}: {state}"


def summed_up(outcomes: Sequence[Outcome], left_out: Sequence[Block], seconds: float) -> int:
    """Print the counts; returns the exit code."""
    failed = [outcome for outcome in outcomes if outcome.problem is not None]
    print(f"\nnot run: {len(left_out)}")
    for block in left_out:
        print(f"  {block.place}: {block.reason}")
    print(f"{len(outcomes)} blocks run, {len(failed)} failed, {len(left_out)} not run; {seconds:.0f} s")
    for outcome in failed:
        print(f"FAILED {outcome.block.place}")
    return 1 if failed or not outcomes else 0


# --- Running --------------------------------------------------------------------------------------------------------


def run_page(shared: Shared, blocks: Sequence[Block]) -> list[Outcome]:
    """The blocks of a page, in order, in one folder; what fails is printed at once."""
    folder = shared.folder_for(blocks[0].page, blocks)
    outcomes = []
    for block in blocks:
        if block.reason is not None:
            continue
        started = time.monotonic()
        run = run_python if block.language == "python" else run_shell
        problem = run(shared, folder, block)
        outcome = Outcome(block, time.monotonic() - started, problem)
        outcomes.append(outcome)
        state = "ran" if outcome.problem is None else "FAILED"
        print(f"{block.place} {block.language}: {state}, {outcome.seconds:.1f} s", flush=True)
        if outcome.problem is not None:
            print("    " + outcome.problem.replace("\n", "\n    "), flush=True)
    return outcomes


def run_shell(shared: Shared, folder: Path, block: Block) -> str | None:
    """The commands of a block in one shell, which ends with the first that fails; returns what is wrong."""
    commands = block.commands()
    script = ["set -euo pipefail", "exec 2>&1"]
    for index, command in enumerate(commands):
        script += [f"printf '\\036%s\\036' {index}", command.text]
    code, printed = completed(shared, folder, ("bash", "-c", "\n".join(script)))
    outputs = re.split(r"\x1e\d+\x1e", printed)[1:]
    if code != 0:
        return f"$ {commands[len(outputs) - 1].text}\n{tail(outputs[-1])}\nexit code {code}"
    for command, output in zip(commands, outputs, strict=True):
        line = missing_line(command.output, output)
        if line is not None:
            return (
                f"$ {command.text}\nthe page shows this line, which was not printed:\n{line}\nprinted:\n{tail(output)}"
            )
    return None


def run_python(shared: Shared, folder: Path, block: Block) -> str | None:
    """A block in a Python of its own, behind the names that the page takes as given; returns what is wrong."""
    given = sorted(free_names(block.text) & set(GIVEN))
    before = f"from tools.documented.given import {', '.join(given)}\n" if given else ""
    (folder / "block.py").write_text(before + block.text, encoding="utf-8")
    code, printed = completed(shared, folder, (sys.executable, "block.py"))
    return f"{tail(printed)}\nexit code {code}" if code else None


def free_names(code: str) -> set[str]:
    """Names that are read somewhere and bound nowhere."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    bound = {node.id for node in nodes if not isinstance(node.ctx, ast.Load)}
    return {node.id for node in nodes} - bound - set(dir(builtins))


def completed(shared: Shared, folder: Path, command: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of a command; all that it started ends with it."""
    process = subprocess.Popen(
        command, cwd=folder, env=shared.environment, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(TYPED.encode(), timeout=LIMIT_S)
        return process.returncode, printed.decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        return -1, f"{printed.decode(errors='replace')}\nlonger than {LIMIT_S} s"


def tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL:])


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
