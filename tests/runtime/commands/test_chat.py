"""`ff-run chat`, as a pipe and on a terminal: what is said, what is kept, what is refused, and how it ends."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from framefusion.console import messages as console
from framefusion.console.plain_text import printable
from framefusion.errors import BudgetError, PromptError, VideoError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.commands.chat import PROMPT, Chat
from framefusion.runtime.commands.cli import ff_run
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared
from tests.patience import PATIENCE
from tests.wheel import ROOT

NEW = 6
CTRL_C = "\x03"


def chat(bundle: Path, *lines: str, flags: tuple[object, ...] = ()) -> Result:
    """A conversation through a pipe."""
    arguments = ["chat", str(bundle), "--max-new-tokens", str(NEW), *map(str, flags)]
    return CliRunner().invoke(ff_run, arguments, input="".join(f"{line}\n" for line in lines))


def answers(result: Result) -> list[str]:
    return result.stdout.split("\n")[:-1]


def test_answers_are_those_of_one_request(bundle: Path, pipeline: Pipeline, film: Path) -> None:
    result = chat(bundle, "What happens?", flags=("--video", film, "--cost", 0.5))
    assert result.exit_code == 0, result.output
    turn = Turn("user", (Visual.VIDEO, "What happens?"))
    expected = pipeline.generate([turn], [film], Request(NEW, cost=0.5))
    assert result.stdout == printable(expected.text) + "\n"
    assert f"{expected.prompt_tokens} tokens, {expected.kv_lengths[-1]} in the last layer" in result.stderr


def test_a_second_message_finds_the_film_in_the_caches(bundle: Path, film: Path) -> None:
    result = chat(bundle, f"/video {film}", "What happens?", "And then?", "/tokens")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in answers(result)[-2:]]
    (_, first, visual, reused, _), (_, second, same, from_caches, _) = ([int(cell) for cell in row] for row in rows)
    assert reused == 0
    assert visual == same > 0
    assert second > from_caches >= first
    assert f"{from_caches} of them from the caches" in result.stderr


def test_turns_equal_those_of_a_session(bundle: Path, pipeline: Pipeline, film: Path) -> None:
    result = chat(bundle, "What happens?", "And then?", flags=("--video", film, "--system", "Be brief."))
    session = pipeline.session()
    turns = [Turn("system", ("Be brief.",)), Turn("user", (Visual.VIDEO, "What happens?"))]
    expected = [session.ask(turns, [film], Request(NEW)).text, session.ask("And then?", (), Request(NEW)).text]
    assert result.stdout == "".join(f"{printable(text)}\n" for text in expected)


def test_comparing_leaves_the_conversation_as_it_was(bundle: Path, film: Path) -> None:
    begin = ("What happens?", "And then?")
    plain = chat(bundle, *begin, "Why?", "/tokens", flags=("--video", film, "--cost", 0.3))
    compared = chat(bundle, *begin, "/compare", "Why?", "/tokens", flags=("--video", film, "--cost", 0.3))
    table = re.search(r"^reduced +(\d+) .*\nevery token +(\d+) ", compared.stdout, re.MULTILINE)
    assert table is not None, compared.stdout
    assert int(table[1]) < int(table[2])
    assert answers(compared)[-4:] == answers(plain)[-4:]


def test_commands_say_what_was_said_and_begin_anew(bundle: Path, picture: Path) -> None:
    result = chat(bundle, f"/image {picture}", "/cost 0.5", "Look.", "//not a command", "/history", "/new", "/history")
    assert result.exit_code == 0, result.output
    said = [line for line in answers(result) if line.startswith("user: ")]
    assert said == ["user: [image] Look.", "user: /not a command"]
    assert "keeps 50 %" in result.stderr
    assert "a new conversation" in result.stderr


@pytest.mark.parametrize(
    ("line", "kind", "phrase"),
    [
        ("/dance", PromptError, "/dance is unknown, known are /video"),
        ("/video nowhere.mp4", VideoError, "no such file"),
        ("/video", VideoError, "no such file"),
        ("/cost much", BudgetError, "is no number"),
        ("/cost 0", BudgetError, "out of range"),
        ("/cost nan", BudgetError, "out of range"),
        ("/compare", PromptError, "there is none: ask something first"),
    ],
)
def test_a_pipe_ends_with_the_exit_code_of_what_was_wrong(
    bundle: Path, line: str, kind: type[PromptError], phrase: str
) -> None:
    result = chat(bundle, line, "This is never said.")
    assert result.exit_code == kind.exit_code, result.output
    assert result.stdout == ""
    assert phrase in result.stderr


def test_a_built_in_cost_stays_what_it_is(film: Path) -> None:
    fixed = shared("fixed-gqa")
    refused = chat(fixed, "/cost 0.9", "This is never said.")
    assert refused.exit_code == BudgetError.exit_code, refused.output
    assert refused.stdout == ""
    assert "is built in (--reduction fixed)" in refused.stderr
    cost = Bundle(fixed, verify=False).manifest.reduction.cost
    compared = chat(fixed, f"/cost {cost}", "What happens?", "/compare", flags=("--video", film))
    assert compared.exit_code == 0, compared.output
    table = re.search(r"^reduced +(\d+) .*\nevery token +(\d+) ", compared.stdout, re.MULTILINE)
    assert table is not None, compared.stdout
    assert int(table[1]) < int(table[2])


def test_nothing_to_compare_is_refused(bundle: Path) -> None:
    result = chat(bundle, "What happens?", "/compare", "This is never said.", flags=("--cost", 1))
    assert result.exit_code == BudgetError.exit_code, result.output
    assert len(answers(result)) == 1
    assert "nothing to compare" in result.stderr


def test_nothing_said_is_nothing_answered(bundle: Path) -> None:
    assert chat(bundle).stdout == ""
    assert chat(bundle, "", "   ", "/quit", "never").stdout == ""


class Terminal:
    """`ff-run chat` with somebody at the keys."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-c", "from framefusion.start import ff_run; ff_run()", "chat"]
        self.pid, self.keys = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [*command, *map(str, arguments)], os.environ | {"NO_COLOR": "1"})
        self.shown = ""

    def wait_for(self, text: str, times: int = 1, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while self.shown.count(text) < times:
            assert time.monotonic() < end, self.shown
            if select.select([self.keys], [], [], 0.2)[0]:
                self.shown += os.read(self.keys, 4096).decode(errors="replace")

    def wait_for_prompt(self) -> None:
        """Until the last thing shown is the prompt."""
        end = time.monotonic() + PATIENCE
        while not self.shown.endswith(PROMPT):
            assert time.monotonic() < end, self.shown
            if select.select([self.keys], [], [], 0.2)[0]:
                self.shown += os.read(self.keys, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def end(self, seconds: float = PATIENCE, *, press: str = "") -> int:
        """Wait until it ends, and press a key again each second: Python notices one that comes between the prompt and
        its wait for input only at the next."""
        end = time.monotonic() + seconds
        pressed = time.monotonic()
        while (done := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if press and time.monotonic() > pressed + 1:
                self.type(press)
                pressed = time.monotonic()
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it goes on: {self.shown}")
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(done[1])


@pytest.mark.slow
def test_somebody_who_types_goes_on_after_an_error(bundle: Path, film: Path) -> None:
    terminal = Terminal(bundle, "--max-new-tokens", NEW)
    terminal.wait_for_prompt()
    terminal.type("/video nowhere.mp4\n")
    terminal.wait_for("error: /video nowhere.mp4: there is no such file")
    terminal.type(f"/video {film}\nWhat happens?\n")
    terminal.wait_for("first token after")
    terminal.wait_for_prompt()  # a key that is typed while the terminal changes its mode can be lost
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_leaves(bundle: Path) -> None:
    terminal = Terminal(bundle)
    terminal.wait_for_prompt()
    terminal.type(CTRL_C)
    assert terminal.end(press=CTRL_C) == 0


def test_ctrl_c_stops_an_answer_and_not_the_conversation(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Chat(pipeline, Request(NEW), pipeline.manifest.sampling, interactive=True)
    write = console.write
    pressed: list[str] = []

    def press(text: str, *, newline: bool = True) -> None:
        if text and not pressed:
            pressed.append(text)
            raise KeyboardInterrupt
        write(text, newline=newline)

    monkeypatch.setattr(console, "write", press)
    talk.take("Tell me everything.")
    assert pressed
    assert talk.session.turns == ()
    assert "stopped" in capsys.readouterr().err
    talk.take("And now?")
    alone = pipeline.session().ask("And now?", (), Request(NEW))
    assert capsys.readouterr().out == printable(alone.text) + "\n"
