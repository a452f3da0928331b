"""What stands where commands write and is not theirs: it is refused by name, and every byte stays."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from framefusion import errors
from framefusion.export.engines.cache import EngineCache
from framefusion.export.evaluate.answer_file import AnswerFile
from framefusion.export.writing import journal
from framefusion.export.writing.amendment import Amendment
from framefusion.export.writing.journal import valid_manifest
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.view.page import write_page
from framefusion.storage import files
from tests.commands import assert_refused, export
from tests.patience import PATIENCE
from tests.test_unfinished_builds import largest_file
from tools.attack.endings import Ending, run_until

pytestmark = pytest.mark.usefixtures("instant_traces")
IDENTITY = {"model": "0" * 64, "setup": {}}


def build(checkpoint: Path, output: object, *flags: str) -> tuple[object, ...]:
    return ("build", checkpoint, "-o", output, "--no-check", *flags)


def letter(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("Dear")
    return path


@pytest.fixture
def built(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    shutil.copytree(bundle, tmp_path / "built")
    return tmp_path / "built"


# --- Outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "word"), [(".", "no name"), ("a" * 300, "300 bytes"), ("link", "is a link"), ("file/b", "no folder")]
)
def test_names_that_cannot_be_an_output(checkpoint: Path, tmp_path: Path, output: str, word: str) -> None:
    letter(tmp_path / "file")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    target = Path(".") if output == "." else tmp_path / output
    assert_refused(export(*build(checkpoint, target, "--force")), errors.StorageError, word)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "real"]


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="nothing is mounted at a place that is known")
def test_a_mounted_disk_is_no_output(checkpoint: Path) -> None:
    """It cannot be renamed, which would show when all work is done."""
    assert_refused(export(*build(checkpoint, "/proc", "--force")), errors.StorageError, "choose /proc/bundle")


def test_the_checkpoint_itself_is_no_output(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    before = sorted((tmp_path / "c").iterdir())
    assert_refused(export(*build(tmp_path / "c", tmp_path / "c", "--force")), errors.StorageError, "--force")
    assert sorted((tmp_path / "c").iterdir()) == before


@pytest.mark.parametrize("linked", [False, True])
def test_a_foreign_staging_folder(checkpoint: Path, tmp_path: Path, linked: bool) -> None:
    mine = letter(tmp_path / ("mine" if linked else "o.partial") / "letter.txt")
    if linked:
        (tmp_path / "o.partial").symlink_to("mine")
    assert_refused(export(*build(checkpoint, tmp_path / "o")), errors.StorageError, "o.partial", "move it away")
    assert mine.read_text() == "Dear"


def test_foreign_files_in_an_unfinished_build(checkpoint: Path, tmp_path: Path) -> None:
    with largest_file(80_000):
        export(*build(checkpoint, tmp_path / "o"))
    mine = letter(tmp_path / "o.partial" / "segments" / "notes.txt")
    result = export(*build(checkpoint, tmp_path / "o"))
    assert_refused(result, errors.StorageError, "segments/notes.txt", "move it away")
    mine.unlink()
    assert export(*build(checkpoint, tmp_path / "o")).exit_code == 0


def test_foreign_files_in_a_bundle_that_is_replaced(checkpoint: Path, built: Path) -> None:
    mine = letter(built / "segments" / "notes.txt")
    letter(built.with_name("built.old") / "letter.txt")
    result = export(*build(checkpoint, built, "--force"))
    assert_refused(result, errors.StorageError, "segments/notes.txt", "--force does not remove that")
    mine.unlink()
    assert export(*build(checkpoint, built, "--force")).exit_code == 0
    assert sorted(path.name for path in built.parent.iterdir()) == ["built", "built.old"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_build_killed_while_it_replaces(
    checkpoint: Path, built: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """In one step where the system can; else the next command gives the old bundle its name back."""
    killing: list[Callable[..., object]] = [files.exchange, files.rename_new]

    def killed(*names: Path) -> None:
        killing[0 if exchanged else 1](*names)
        os.kill(os.getpid(), 9)

    def replace_it() -> int:
        monkeypatch.setattr(files, "exchange", killed if exchanged else lambda *_: False)
        if not exchanged:
            monkeypatch.setattr("framefusion.export.writing.staging.files.rename_new", _only_once(built, killed))
        return export(*build(checkpoint, built, "--force")).exit_code

    assert run_until(replace_it, Ending("end"), PATIENCE).status == -9
    beside = {path.name for path in built.parent.iterdir()}
    assert len(beside) == 2
    assert built.exists() == exchanged
    assert_refused(export(*build(checkpoint, built)), errors.StorageError, "exists")
    assert valid_manifest(built) is not None
    left = [] if exchanged else ["built.partial"]  # complete: the same command with --force goes on
    assert [path.name for path in built.parent.iterdir() if path != built] == left


def _only_once(built: Path, killed: Callable[..., None]) -> Callable[..., None]:
    rename = files.rename_new

    def renamed(source: Path, target: Path) -> None:
        (killed if source == built else rename)(source, target)

    return renamed


# --- Bundles that change ----------------------------------------------------------------------------------------------


def test_a_copied_journal_is_not_obeyed(built: Path) -> None:
    mine = letter(built / "notes.txt")
    journal.Journal(built, removes=("notes.txt",)).save()
    entries = json.loads((built / "journal.json").read_text())
    (built / "journal.json").write_text(json.dumps(entries | {"inode": entries["inode"] + 1}))
    journal.tidy(built)
    assert mine.read_text() == "Dear"


@pytest.mark.parametrize("name", ["../mine/letter.txt", "segments/../../mine/letter.txt", "link/letter.txt"])
def test_names_that_leave_the_bundle_remove_nothing(built: Path, name: str) -> None:
    mine = letter(built.parent / "mine" / "letter.txt")
    (built / "link").symlink_to("../mine")
    with pytest.raises(ValueError, match="letter"):
        files.remove_named(built, ["embedding.bin", name])
    assert mine.read_text() == "Dear"
    assert (built / "embedding.bin").exists()


def test_an_amendment_is_whole_or_not_at_all(built: Path) -> None:
    before = read_manifest(built)
    letter(built / "engines" / "mine")

    def amend(fail: bool) -> None:
        with Amendment(built) as amendment:
            letter(amendment.scratch / "engines" / "one.engine")
            amendment.commit(["engines/one.engine"], ["vision/graph.onnx"])
            if fail:
                os.kill(os.getpid(), 9)

    assert run_until(lambda: amend(True), Ending("end"), PATIENCE).status == -9
    assert not (built / "engines" / "one.engine").exists()
    journal.tidy(built)  # what was committed is carried out by the next command
    assert (built / "engines" / "one.engine").read_text() == "Dear"
    assert not (built / "vision" / "graph.onnx").exists()
    assert (built / "engines" / "mine").read_text() == "Dear"
    assert not {".writing", "journal.json", ".lock"} & {path.name for path in built.iterdir()}
    assert read_manifest(built) == before


def test_an_amendment_refuses_what_is_in_the_way(built: Path) -> None:
    mine = letter(built / "engines" / "one.engine")
    with Amendment(built) as amendment, pytest.raises(errors.StorageError, match=r"one\.engine is in the way"):
        amendment.refuse_foreign(["engines/one.engine"])
    assert mine.read_text() == "Dear"


def test_a_full_disk_in_an_amendment(built: Path) -> None:
    before = sorted(built.rglob("*"))
    with largest_file(2), pytest.raises(errors.StorageError, match="cannot be written"), Amendment(built):
        pass
    with pytest.raises(errors.StorageError, match="cannot be written"), Amendment(built) as amendment, largest_file(2):
        letter(amendment.scratch / "one.engine")
    assert sorted(built.rglob("*")) == before


def test_an_entry_of_the_cache_that_names_files_elsewhere(tmp_path: Path) -> None:
    mine = letter(tmp_path / "mine.json")
    cache = EngineCache(tmp_path / "cache", 0)
    record = {"size": 4, "sha256": "../../mine.json"}
    entry = {"key": "../../mine", "components": {}, "file": record, "facts": {}}
    (tmp_path / "cache" / "entries" / f"{'0' * 64}.json").write_text(json.dumps(entry))
    cache.trim()
    assert mine.read_text() == "Dear"


# --- Evaluations and pages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["no newline", "two\nlines\n", '{"format": 1}\n{"half', "[]\n"])
def test_a_foreign_file_beside_an_evaluation(tmp_path: Path, content: str) -> None:
    partial = tmp_path / "out.json.partial"
    partial.write_text(content)
    with pytest.raises(errors.EvaluationError), AnswerFile(tmp_path / "out.json", IDENTITY):
        pass
    assert partial.read_text() == content


def test_a_link_or_fifo_beside_an_evaluation(tmp_path: Path) -> None:
    mine = letter(tmp_path / "mine")
    partial = tmp_path / "out.json.partial"
    partial.symlink_to("mine")
    with pytest.raises(errors.StorageError), AnswerFile(tmp_path / "out.json", IDENTITY):
        pass
    partial.unlink()
    os.mkfifo(partial)
    with pytest.raises(errors.StorageError), AnswerFile(tmp_path / "out.json", IDENTITY):
        pass
    assert mine.read_text() == "Dear"


def test_an_old_page_stays_where_the_disk_is_full(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_page({"name": "first"}, out)
    before = out.read_bytes()
    with largest_file(100), pytest.raises(errors.StorageError, match="free space"):
        write_page({"name": "second"}, out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    write_page({"name": "second"}, out)
    assert b"second" in out.read_bytes()
    with pytest.raises(errors.StorageError, match="no page"):
        write_page({"name": "third"}, letter(tmp_path / "letter.html"))


def test_a_page_that_somebody_edited_is_theirs(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_page({"name": "first"}, out)
    notes = out.read_text(encoding="utf-8").replace("</body>", "<p>Look at frame 7.</p></body>")
    assert "frame 7" in notes
    out.write_text(notes, encoding="utf-8")
    with pytest.raises(errors.StorageError, match="was edited: choose another file"):
        write_page({"name": "second"}, out)
    assert out.read_text(encoding="utf-8") == notes


def test_a_manifest_that_names_no_file_of_its_own_folder_is_nobodys(built: Path) -> None:
    manifest = read_manifest(built)
    assert valid_manifest(built) is not None
    (built / "manifest.json").unlink()
    (built / "manifest.json").symlink_to("elsewhere.json")
    assert valid_manifest(built) is None
    assert replace(manifest) == manifest


def test_what_a_process_left_that_was_killed_behind_its_work_is_tidied(built: Path) -> None:
    lock = built / ".lock"
    lock.touch()
    journal.tidy(built)
    assert not lock.exists()
    lock.write_text("Dear")
    journal.tidy(built)
    assert lock.read_text() == "Dear"
    lock.write_text("")
    with files.hold(lock):
        journal.tidy(built)
        assert lock.exists()  # its process lives
    lock.unlink()


def test_a_way_back_out_of_a_file_is_no_place_for_an_output(tmp_path: Path) -> None:
    mine = letter(tmp_path / "letter.html")
    with pytest.raises(errors.StorageError, match="is no folder"):
        files.output_path(mine / ".." / "bundle")
    assert files.output_path(tmp_path / "new" / "bundle") == tmp_path.resolve() / "new" / "bundle"
