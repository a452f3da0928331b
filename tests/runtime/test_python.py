"""The library as a program uses it: the name of a folder, a text, files, messages of another library."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import framefusion
from framefusion import Pipeline, Request, Turn, Visual
from framefusion.errors import BundleError, ClosedError, MediaWarning, PromptError, VideoError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.commands.cli import ff_run
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import Source, as_image, as_video, source_kind
from framefusion.runtime.text.messages import Conversation, read_conversation
from framefusion.runtime.text.sampling import GenerationConfig
from tests.bundles import shared

NEW = 4
FEW = Request(max_new_tokens=NEW)
WHAT = "What happens?"


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed, is freed because nothing refers to it any more."""
    gc.disable()
    yield
    gc.enable()


# --- Names ----------------------------------------------------------------------------------------------------------


def test_the_front_door_has_what_its_types_say() -> None:
    stub = Path(framefusion.__file__).with_name("__init__.pyi").read_text(encoding="utf-8")
    typed = {line.rpartition(" as ")[2] for line in stub.splitlines() if line.startswith("from ")}
    assert typed == set(framefusion.__all__) <= set(dir(framefusion))
    assert [name for name in framefusion.__all__ if not isinstance(getattr(framefusion, name), type)] == []
    assert framefusion.Bundle is Bundle
    with pytest.raises(AttributeError, match="'framefusion' has no attribute 'Pipelines'"):
        framefusion.Pipelines  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_loads_nothing_heavy_until_a_name_is_used() -> None:
    code = (
        "import sys, framefusion; heavy = {'numpy', 'onnxruntime', 'av', 'PIL', 'tokenizers', 'torch'}\n"
        "dir(framefusion); assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from framefusion import Pipeline; assert 'torch' not in sys.modules; print(Pipeline.__module__)"
    )
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("framefusion.runtime.pipeline", "")


# --- Opening and closing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_a_pipeline_opens_a_folder_and_frees_it(
    bundle: Path, film: Path, pipeline: Pipeline, kind: type, no_collector: None
) -> None:
    with Pipeline(kind(bundle), threads=1) as opened:
        assert opened.bundle.verified
        answer = opened.generate(WHAT, [film], FEW)
        backend = weakref.ref(opened.backend)
        session = opened.session()
        steps = opened.stream(WHAT, request=FEW)
        next(steps)
    assert answer.token_ids == pipeline.generate(WHAT, [film], FEW).token_ids
    with pytest.raises(ClosedError, match="was closed: open another"):
        opened.generate(WHAT, request=FEW)
    with pytest.raises(ClosedError):
        session.ask(WHAT)
    with pytest.raises(ClosedError):
        list(steps)
    del steps
    opened.close()
    assert backend() is None
    with pytest.raises(AttributeError, match="no attribute 'backends'"):
        opened.backends  # type: ignore[attr-defined]  # noqa: B018


def test_a_folder_is_verified_as_a_bundle_is(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Pipeline(tmp_path)


def test_a_backend_of_the_caller_outlives_the_pipeline(bundle: Path, pipeline: Pipeline) -> None:
    with Pipeline(Bundle(bundle, verify=False), pipeline.backend) as other:
        other.generate(WHAT, request=FEW)
    assert pipeline.generate(WHAT, request=FEW).token_ids


# --- How tokens are chosen ------------------------------------------------------------------------------------------


def test_settings_of_tokens_are_those_of_a_generation_config(pipeline: Pipeline) -> None:
    base = pipeline.manifest.generation
    request = Request(12, seed=5, temperature=2.0, top_p=0.9, top_k=0, repetition_penalty=1.3)
    config = replace(base, do_sample=True, temperature=2.0, top_p=0.9, top_k=0, repetition_penalty=1.3)
    assert request.generation_over(base) == config
    expected = pipeline.generate(WHAT, request=Request(12, seed=5, generation=config)).token_ids
    assert pipeline.generate(WHAT, request=request).token_ids == expected
    assert pipeline.generate(WHAT, request=replace(request, seed=6)).token_ids != expected


def test_a_repetition_penalty_alone_draws_nothing(pipeline: Pipeline) -> None:
    base = pipeline.manifest.generation
    assert Request(repetition_penalty=1.5).generation_over(base) == replace(base, repetition_penalty=1.5)
    assert Request().generation_over(base) == base


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 1.5}, "top_k is 1.5: give a whole number"),
        (
            {"temperature": 1.0, "generation": GenerationConfig(temperature=2.0)},
            "temperature asks for temperature=1.0, generation says 2.0",
        ),
        ({"top_p": 0.5, "generation": GenerationConfig(do_sample=False)}, "top_p asks for do_sample=True, generation"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Request(**fields)


# --- What is said and shown -----------------------------------------------------------------------------------------


def messages(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_a_text_shows_the_files_before_it_in_order(pipeline: Pipeline, film: Path, picture: Path) -> None:
    turn = Turn("user", (Visual.IMAGE, Visual.VIDEO, WHAT))
    expected = pipeline.generate([turn], [picture, film], FEW)
    assert expected.visual_tokens > 64
    shown: list[tuple[Conversation, list[Source]]] = [
        (WHAT, [picture, str(film)]),
        (messages({"type": "image"}, {"type": "video"}, {"type": "text", "text": WHAT}), [picture, film]),
        (messages({"type": "image", "image": picture}, {"type": "video", "path": str(film)}, WHAT), []),
        (messages({"type": "image", "image": Image.open(picture)}, {"type": "video"}, WHAT), [film]),
    ]
    for conversation, files in shown:
        answer = pipeline.generate(conversation, files, FEW)
        assert (answer.token_ids, answer.kv_lengths) == (expected.token_ids, expected.kv_lengths)


def test_messages_are_turns(pipeline: Pipeline) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": WHAT}]
    turns = [Turn("system", "Be brief."), Turn("user", WHAT)]
    assert pipeline.generate(said, request=FEW).token_ids == pipeline.generate(turns, request=FEW).token_ids
    assert pipeline.generate(said[1], request=FEW).token_ids == pipeline.generate(WHAT, request=FEW).token_ids


@pytest.mark.parametrize(
    ("said", "files", "message"),
    [
        (messages({"type": "audio", "audio": "a.wav"}), [], "part 0 of message 0 is of type 'audio': use text, video"),
        (messages({"type": "video", "video": "a", "fps": 2}), [], "unknown key 'fps', known are path, type, video"),
        (messages({"type": "image", "url": "http://x"}), [], "names a url, only what is on this machine"),
        (messages({"type": "image", "image": "a", "path": "a"}), [], "both image and path"),
        (messages({"type": "text"}), [], "has no 'text'"),
        (messages({"type": "text", "text": 5}), [], "is 5: give a str"),
        (messages(5), [], "part 0 of message 0 is 5: give a mapping"),
        (messages({"type": "video"}), [], "message 0 shows a video or an image that is nowhere given"),
        (messages({"type": "video", "video": "a"}), ["b"], "1 more were given"),
        ([{"role": "user", "content": "a", "name": "b"}], [], "message 0 has the unknown key 'name'"),
        ([{"role": "user", "content": 5}], [], "the content of message 0 is 5"),
        ([{"role": "tool", "content": "a"}], [], "role 'tool' is unknown"),
        ([{"content": "a"}], [], "message 0 has no 'role'"),
        ([Turn("user", "a"), {"role": "user", "content": "a"}], [], "message 0 is Turn"),
        (WHAT, "clip.mp4", "files is one name"),
        (WHAT, np.zeros((4, 8, 8, 3), np.uint8), "files is one source, of type ndarray: give a list"),
        ([Turn("user", (Visual.IMAGE,))], Image.new("RGB", (8, 8)), "files is one source, of type Image"),
        (WHAT, {"video": "a"}, "files is one source, of type dict"),
        (messages({"type": "video"}), bytearray(8), "files is one source, of type bytearray"),
        (WHAT, (name for name in "ab"), r"which cannot be read twice: give list\(files\)"),
        (WHAT, None, "files is of type NoneType"),
    ],
)
def test_messages_are_refused_by_name(said: Any, files: Sequence[Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_conversation(said, files)


def test_the_kind_of_a_source_is_what_it_holds(film: Path, picture: Path, tmp_path: Path) -> None:
    gray = np.zeros((8, 8), np.uint8)
    pixels = np.zeros((8, 8, 3), np.uint8)
    for name in ("a.bmp", "a.ppm", "a.webp", "a.tiff", "a.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
        assert source_kind(tmp_path / name) == "image"
    for name in ("b.webp", "b.gif", "b.png"):
        frames = [Image.fromarray(pixels + 60 * level) for level in range(3)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert source_kind(tmp_path / name) == "video"
    disguised = tmp_path / "film.png"
    disguised.write_bytes(film.read_bytes())
    assert [source_kind(source) for source in (picture, gray, pixels, Image.open(picture))] == ["image"] * 4
    assert [source_kind(source) for source in (disguised, [pixels], pixels[None])] == ["video"] * 3


def test_what_is_neither_film_nor_picture_is_refused_by_name(pipeline: Pipeline, film: Path, tmp_path: Path) -> None:
    note = tmp_path / "note.pdf"
    note.write_bytes(b"%PDF-1.7 and more")
    with pytest.raises(VideoError, match=r"note.pdf is neither a film nor a picture that is read \(it is a PDF\)"):
        pipeline.generate(WHAT, [note], FEW)
    with pytest.raises(VideoError, match="cannot be opened"):
        pipeline.generate(WHAT, [tmp_path / "none.mp4"], FEW)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(film.read_bytes()[:300])
    with pytest.raises(VideoError, match=r"broken.mp4 is neither a film nor .* is read \(is truncated"):
        pipeline.generate(WHAT, [broken], FEW)
    with pytest.raises(VideoError, match="a source of type dict is neither a film nor a picture"):
        pipeline.generate(WHAT, [{"video": "a"}], FEW)  # type: ignore[list-item]


# --- Talking --------------------------------------------------------------------------------------------------------


def test_a_chat_shows_its_files_with_the_first_message_and_reads_them_once(pipeline: Pipeline, film: Path) -> None:
    chat = pipeline.chat(film, request=FEW, system="Be brief.")
    session = pipeline.session()
    first = session.ask([Turn("system", "Be brief."), Turn("user", (Visual.VIDEO, WHAT))], [film], FEW)
    second = session.ask("Who is it?", request=FEW)
    assert chat.ask(WHAT).token_ids == first.token_ids
    assert "".join(step.text for step in chat.stream("Who is it?")) == second.text
    assert chat.turns == session.turns
    assert chat.files == (film,)
    assert (chat.records[1].videos, chat.records[1].restart) == ((), None)
    assert chat.records[1].reused_tokens == session.records[1].reused_tokens > first.prompt_tokens
    assert repr(chat).startswith("<Session of 2 messages about 1 film(s) and picture(s): ")


def test_a_first_message_that_fails_may_be_put_again_with_the_files(pipeline: Pipeline, film: Path) -> None:
    chat = pipeline.chat(film, request=FEW)
    with pytest.raises(PromptError):
        chat.ask("x " * 2000)
    answer = chat.ask(WHAT)
    assert answer.visual_tokens == 64
    assert answer.token_ids == pipeline.generate(WHAT, [film], FEW).token_ids


def test_files_join_those_of_the_chat(pipeline: Pipeline, film: Path, picture: Path) -> None:
    chat = pipeline.chat(film, request=FEW)
    assert chat.ask(WHAT, [picture]).token_ids == pipeline.generate(WHAT, [film, picture], FEW).token_ids
    with pytest.raises(PromptError, match="files is one name"):
        chat.ask(WHAT, str(picture))


# --- Answers --------------------------------------------------------------------------------------------------------


def test_an_answer_says_which_tokens_each_layer_holds(pipeline: Pipeline, film: Path) -> None:
    answer = pipeline.generate(WHAT, [film], FEW)
    labels = pipeline.read(WHAT, [film])[0].labels
    shown = np.flatnonzero(labels != -1)
    before = np.arange(answer.prompt_tokens)
    for layer, length in enumerate(answer.kv_lengths):
        kept = answer.kept(layer)
        assert kept.size == length
        assert np.isin(kept, before).all()
        assert np.isin(np.flatnonzero(labels == -1), kept).all()  # text is never dropped
        np.testing.assert_array_equal(shown[answer.kept(layer, visual=True)], kept[labels[kept] != -1])
        before = kept
    assert 0 < answer.kept(-1, visual=True).size < 64
    with pytest.raises(PromptError, match="layer 99 is none of"):
        answer.kept(99)


def test_a_built_in_cost_is_refused_by_its_value_though_the_reducer_is_that_of_the_bundle(film: Path) -> None:
    with Pipeline(Bundle(shared("fixed-gqa"), verify=False), threads=1) as fixed:
        request = replace(FEW, reducer=fixed.manifest.reduction.reducer, cost=0.9)
        with pytest.raises(PromptError, match=r"are built in, 0\.9 was asked"):
            fixed.generate(WHAT, [film], request)


def test_the_fixed_mode_says_what_its_last_layer_holds(film: Path) -> None:
    with Pipeline(Bundle(shared("fixed-gqa"), verify=False), threads=1) as fixed:
        answer = fixed.generate(WHAT, [film], FEW)
    assert answer.kept(-1).size == answer.kv_lengths[-1] < answer.kv_lengths[0]
    with pytest.raises(PromptError, match="layer 0 is inside a graph of the fixed mode"):
        answer.kept(0)


def test_an_answer_is_values_that_json_takes_and_that_the_command_prints(
    pipeline: Pipeline, bundle: Path, film: Path
) -> None:
    answer = pipeline.generate(WHAT, [film], FEW)
    facts = json.loads(json.dumps(answer.to_dict()))
    arguments = ["generate", str(bundle), "--video", str(film), "--prompt", WHAT, "--json"]
    arguments += ["--max-new-tokens", str(NEW)]
    printed = json.loads(CliRunner().invoke(ff_run, arguments).stdout)
    assert set(printed) - set(facts) == {"backend", "warnings"}
    timed = {"seconds", "tokens_per_second", "cost"}
    assert {key: facts[key] for key in facts if key not in timed} == {
        key: printed[key] for key in facts if key not in timed
    }
    assert facts["cost"]["reached"] == printed["cost"]["reached"]


def test_what_is_printed_of_an_object_is_one_line(pipeline: Pipeline, bundle: Path, film: Path) -> None:
    answer = pipeline.generate(WHAT, [film], FEW)
    assert str(answer) == answer.text
    assert "64 visual" in repr(answer)
    assert f"Bundle {bundle}: qwen2_vl" in repr(pipeline)
    assert repr(pipeline).startswith(f"<Pipeline on {pipeline.backend.name}: ")
    for subject in (answer, pipeline, pipeline.bundle, pipeline.session()):
        assert "\n" not in repr(subject)
    closed = Pipeline(pipeline.bundle, pipeline.backend)
    closed.close()
    assert repr(closed).startswith("<Pipeline closed: ")


# --- Bytes and open files -------------------------------------------------------------------------------------------


def test_bytes_and_open_files_are_shown_as_the_file_is(pipeline: Pipeline, film: Path, picture: Path) -> None:
    expected = pipeline.generate(WHAT, [film, picture], FEW)
    with film.open("rb") as open_film, picture.open("rb") as open_picture:
        open_film.read(100)  # it is read from its first byte wherever it stands
        sources: list[list[Source]] = [
            [film.read_bytes(), picture.read_bytes()],
            [io.BytesIO(film.read_bytes()), bytearray(picture.read_bytes())],
            [open_film, open_picture],
            [open_film, memoryview(picture.read_bytes())],
        ]
        for shown in sources:
            answer = pipeline.generate(WHAT, shown, FEW)
            assert (answer.token_ids, answer.kv_lengths) == (expected.token_ids, expected.kv_lengths)
        assert not open_film.closed
    assert answer.videos == expected.videos


def test_the_temporary_file_of_a_film_is_removed(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sampling = FrameSampling("qwen2_vl")
    assert len(as_video(film.read_bytes(), sampling).frames)
    with pytest.raises(VideoError, match=r"^the video is "):
        as_video(film.read_bytes()[:-200], sampling)
    assert list(tmp_path.iterdir()) == []


def test_content_has_the_limits_of_files(picture: Path, film: Path) -> None:
    content = picture.read_bytes()
    with pytest.raises(VideoError, match=r"^the image has 16777221 bytes, a picture within the limits has 16777220"):
        as_image(bytes(16777221), MediaLimits(image_pixels=1))
    with pytest.raises(VideoError, match=r"^the image is .* the limit is 100"):
        as_image(io.BytesIO(content), MediaLimits(image_pixels=100))
    with pytest.raises(VideoError, match=r"^the video .*limit"):
        as_video(film.read_bytes(), FrameSampling("qwen2_vl"), MediaLimits(frame_pixels=100))


def test_content_that_cannot_be_shown_is_refused_by_name(film: Path, picture: Path, tmp_path: Path) -> None:
    closed = io.BytesIO(b"a")
    closed.close()
    read, write = os.pipe()
    os.close(write)
    with picture.open(encoding="latin-1") as text, os.fdopen(read, "rb") as pipe:
        refused: list[tuple[Any, str]] = [
            (b"", "the image is empty"),
            (io.BytesIO(), "the image is empty"),
            (text, 'is open as text: open it with mode "rb"'),
            (pipe, "is a pipe or a stream, which cannot be read twice"),
            (closed, "of type BytesIO is no open binary file"),
            (b"%PDF-1.7", "the image cannot be read as an image (it is a PDF)"),
        ]
        for source, message in refused:
            with pytest.raises(VideoError, match=re.escape(message)):
                as_image(source)
        with pytest.raises(VideoError, match=r"the source is neither a film nor a picture .*it is a PDF"):
            source_kind(b"%PDF-1.7 and more")
        with pytest.raises(PromptError, match="files is one file"):
            read_conversation(WHAT, text)  # type: ignore[arg-type]


def test_a_damaged_film_in_memory_is_reported_under_its_name() -> None:
    content = (Path(__file__).parents[1] / "media/films/bad_n.mp4").read_bytes()
    with pytest.warns(MediaWarning, match=r"^the video is damaged: 10 of 100 frames are lost"):
        as_video(content, FrameSampling("qwen2_vl"))
