from __future__ import annotations

from typing import Any

import pytest

from framefusion.errors import PromptError, RequestError
from framefusion.runtime.request import MAX_NEW_TOKENS
from framefusion.runtime.server.protocol.parts import ALL_FRAMES, MediaPart, Sampling
from framefusion.runtime.server.protocol.request import ReductionDefaults, read_chat_request
from framefusion.runtime.text.prompt import Visual

FILM = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}


def body(*parts: Any, **fields: Any) -> dict[str, Any]:
    content: Any = [*parts, {"type": "text", "text": "What happens?"}] if parts else "What happens?"
    return {"messages": [{"role": "user", "content": content}], **fields}


def film(**fields: Any) -> Sampling:
    (part,) = read_chat_request(body(FILM, **fields)).media
    return part.sampling


def test_what_a_request_says_of_its_answer() -> None:
    chat = read_chat_request(
        body(
            model="m", max_tokens=7, temperature=0.5, top_p=0.9, top_k=-1, seed=3, stop=["a", "b"], stream=True,
            stream_options={"include_usage": True}, repetition_penalty=1.1, session_id="s",
            framefusion={"cost": 0.3, "reducer": "evs"},
        )
    )  # fmt: skip
    request = chat.request
    assert (request.max_new_tokens, request.temperature, request.top_p, request.top_k) == (7, 0.5, 0.9, 0)
    assert (request.seed, request.stop, request.repetition_penalty) == (3, ("a", "b"), 1.1)
    assert (request.cost, request.reducer) == (0.3, "evs")
    assert (chat.model, chat.stream, chat.include_usage, chat.session_id) == ("m", True, True, "s")
    assert chat.ignored == ()


def test_what_a_request_leaves_out_is_the_bundles() -> None:
    chat = read_chat_request(body(max_tokens=None, temperature=None))
    assert chat.request.max_new_tokens == MAX_NEW_TOKENS
    assert chat.request.temperature is None
    assert chat.request.cost is None
    assert not chat.stream


def test_unknown_fields_are_listed_and_ignored() -> None:
    chat = read_chat_request(body({**FILM, "new": 1}, user="u", metadata={}, nothing=None, stream_options={"x": 1}))
    assert set(chat.ignored) == {"user", "metadata", "messages[0].content[0].new", "stream_options.x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"session_id": "s" * 129}, "session_id"),
        ({"framefusion": {"cost": 0}}, "framefusion.cost"),
        ({"framefusion": {"price": 1}}, "framefusion.price"),
        ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "media_io_kwargs.video.num_frames"),
        ({"media_io_kwargs": {"video": {"num_frames": 4, "nframes": 5}}}, "media_io_kwargs.video.nframes"),
        ({"media_io_kwargs": {"video": {"frames_indices": [2, 1]}}}, "media_io_kwargs.video.frames_indices"),
        ({"mm_processor_kwargs": {"max_pixels": 100}}, "mm_processor_kwargs.max_pixels"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
        ({"messages": [{"role": "system", "content": [PICTURE]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"detail": "no"}}]}]},
            "messages[0].content[0].image_url.url",
        ),
    ],
)
def test_values_that_mean_nothing_here_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_chat_request({**body(), **fields})
    assert refused.value.param == param
    assert refused.value.status == 400


@pytest.mark.parametrize("given", [None, [], "text", 3])
def test_a_body_is_an_object(given: object) -> None:
    with pytest.raises(RequestError, match="give a JSON object"):
        read_chat_request(given)


def test_seeds_and_stops_are_checked_before_anything_is_opened() -> None:
    with pytest.raises((RequestError, PromptError)):
        read_chat_request(body(FILM, repetition_penalty=-1))


def test_frames_are_chosen_by_the_part_before_the_request() -> None:
    assert film() == Sampling()
    assert film(media_io_kwargs={"video": {"num_frames": 8}}).num_frames == 8
    assert film(media_io_kwargs={"video": {"num_frames": -1}}).num_frames == ALL_FRAMES
    assert film(mm_processor_kwargs={"videos_kwargs": {"fps": 2}, "fps": 1}).fps == 2.0
    part = {"type": "video_url", "video_url": {"url": "data:,", "nframes": 4}, "max_frames": 9}
    sampled = read_chat_request(body(part, media_io_kwargs={"video": {"fps": 3}})).media[0].sampling
    assert sampled.num_frames == 4
    assert (sampled.fps, sampled.max_frames) == (None, None)  # a number of frames clears rate and bounds above it
    part = {"type": "video_url", "video_url": {"url": "data:,"}, "fps": 3}
    sampled = read_chat_request(body(part, media_io_kwargs={"video": {"num_frames": 8}})).media[0].sampling
    assert (sampled.fps, sampled.num_frames) == (3.0, None)


def test_addresses_alone_stand_for_their_part() -> None:
    chat = read_chat_request(
        body({"type": "video_url", "video_url": "file:///a.mp4"}, {"type": "image_url", "image_url": "data:,"})
    )
    assert [(part.kind, part.urls) for part in chat.media] == [
        (Visual.VIDEO, ("file:///a.mp4",)),
        (Visual.IMAGE, ("data:,",)),
    ]


def test_a_client_may_send_the_frames_it_sampled() -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AA==,BB==,CC=="}}
    kwargs = {"video": {"num_frames": -1, "fps": 25, "frames_indices": [0, 25, 50], "total_num_frames": 99}}
    (media,) = read_chat_request(body(part, media_io_kwargs=kwargs)).media
    assert media.of_frames
    assert media.urls[1] == "data:image/jpeg;base64,BB=="
    assert media.sampling.frames_indices == (0, 25, 50)


@pytest.mark.parametrize("server_flag", [True, False])
def test_pictures_in_a_row_can_be_a_film(server_flag: bool) -> None:
    fields: dict[str, Any] = {} if server_flag else {"framefusion": {"images_as_video": True}}
    text = {"type": "text", "text": "then"}
    chat = read_chat_request(
        body(PICTURE, PICTURE, text, PICTURE, **fields), ReductionDefaults(images_as_video=server_flag)
    )
    kinds = [part.kind for part in chat.media]
    assert kinds == [Visual.VIDEO, Visual.IMAGE]  # one alone stays a picture
    assert len(chat.media[0].urls) == 2
    as_they_are = body(PICTURE, PICTURE, framefusion={"images_as_video": False})
    assert [part.kind for part in read_chat_request(as_they_are, ReductionDefaults(images_as_video=True)).media] == [
        Visual.IMAGE
    ] * 2


def test_the_servers_reduction_stands_where_a_request_says_nothing() -> None:
    defaults = ReductionDefaults(0.3, "uniform")
    for given, expected in (
        ({}, (0.3, "uniform")),
        ({"framefusion": {"show": True}}, (0.3, "uniform")),
        ({"framefusion": {"cost": 1}}, (1.0, "uniform")),
        ({"framefusion": {"reducer": "fastv"}}, (0.3, "fastv")),
    ):
        request = read_chat_request(body(PICTURE, **given), defaults).request
        assert (request.cost, request.reducer) == expected


def test_roles_of_developers_are_the_systems() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello", "name": "n"}]
    chat = read_chat_request({"messages": messages})
    assert [message.role for message in chat.messages] == ["system", "user"]
    assert not any(isinstance(part, MediaPart) for message in chat.messages for part in message.parts)


def test_names_and_numbers_that_cannot_be_said_again() -> None:
    """Half a surrogate pair cannot be encoded, a line break forges lines of the log, great numbers are no floats."""
    with pytest.raises(RequestError) as refused:
        read_chat_request(body(framefusion={"\ud800\n": 1}))
    assert str(refused.value).startswith(r"framefusion.\ud800\n is unknown")
    assert refused.value.param == r"framefusion.\ud800\n"
    assert read_chat_request(body(**{"x\nINFO forged": 1})).ignored == (r"x\nINFO forged",)
    with pytest.raises(RequestError, match="frames_indices"):
        read_chat_request(body({**FILM, "frames_indices": [10**400]}))
    with pytest.raises(RequestError, match="repetition_penalty"):
        read_chat_request(body(repetition_penalty=1e-300))
