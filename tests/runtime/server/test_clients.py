"""Real clients ask a real server, and get what the pipeline says."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared
from tests.runtime.server.conftest import Running

openai = pytest.importorskip("openai")
NEW = 6
QUESTION = "What happens?"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline(shared("bundle")) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def as_data(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def shows(url: str, text: str = QUESTION, kind: str = "video_url", **beside: Any) -> list[dict[str, Any]]:
    parts = [{"type": kind, kind: {"url": url, **beside}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def ask(client: Any, messages: Any, cost: float | None = 0.4, **settings: Any) -> Any:
    extra = {"framefusion": {"cost": cost}, **settings.pop("extra_body", {})}
    return client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=NEW, temperature=0, extra_body=extra, **settings
    )


def expected(pipeline: Pipeline, film: Path, text: str = QUESTION, **sampling: Any) -> Any:
    chosen = pipeline.manifest.sampling.overridden(sampling.get("fps"), sampling.get("max_frames"))
    return pipeline.generate(text, [film], Request(NEW, cost=0.4, temperature=0), sampling=chosen)


def test_an_answer_is_the_pipelines(client: Any, films: Path, pipeline: Pipeline) -> None:
    film = films / "film.mp4"
    own = expected(pipeline, film)
    for url in (as_data(film), f"file://{film}"):
        answer = ask(client, shows(url))
        assert answer.choices[0].message.content == own.text
        assert answer.choices[0].finish_reason == own.finish_reason
        assert answer.model == "tiny"
        assert answer.usage.prompt_tokens == own.prompt_tokens
        assert answer.usage.completion_tokens == len(own.token_ids)
        details = answer.usage.prompt_tokens_details
        assert details.visual_tokens == own.visual_tokens
        assert details.kept_tokens == own.kv_lengths[-1] - (own.prompt_tokens - own.visual_tokens)
        assert details.cost == pytest.approx(own.cost, abs=1e-4)


def test_pictures_too(client: Any, films: Path, pipeline: Pipeline) -> None:
    own = expected(pipeline, films / "picture.png")
    answer = ask(client, shows(as_data(films / "picture.png", "image/png"), kind="image_url"))
    assert answer.choices[0].message.content == own.text


def test_a_stream_is_the_same_answer(client: Any, films: Path, pipeline: Pipeline) -> None:
    own = expected(pipeline, films / "film.mp4")
    pieces = list(ask(client, shows(f"file://{films}/film.mp4"), stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == own.text
    assert pieces[0].choices[0].delta.role == "assistant"
    reasons = [piece.choices[0].finish_reason for piece in pieces if piece.choices]
    assert reasons[-1] == own.finish_reason
    assert set(reasons[:-1]) == {None}
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == len(own.token_ids)
    assert len({piece.id for piece in pieces}) == 1


def test_many_at_once_get_what_each_would_alone(server: Running, films: Path, pipeline: Pipeline) -> None:
    texts = [f"Question {number}?" for number in range(6)]
    names = ["film.mp4", "other.mp4"]
    own = {(name, text): expected(pipeline, films / name, text).text for name in names for text in texts}

    async def run() -> list[tuple[tuple[str, str], str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(name: str, text: str) -> tuple[tuple[str, str], str]:
                stream = await ask(client, shows(f"file://{films}/{name}", text), stream=True)
                return (name, text), "".join([piece.choices[0].delta.content or "" async for piece in stream])

            return await asyncio.gather(*(one(name, text) for name in names for text in texts))

    assert dict(asyncio.run(run())) == own


def test_frames_as_clients_choose_them(client: Any, films: Path, pipeline: Pipeline) -> None:
    film = films / "film.mp4"
    own = expected(pipeline, film, max_frames=2)
    assert own.videos[0].sampled_frames == 2
    part = ask(client, shows(f"file://{film}", max_frames=2))
    exact = ask(client, shows(f"file://{film}", num_frames=2))
    body = ask(client, shows(f"file://{film}"), extra_body={"media_io_kwargs": {"video": {"num_frames": 2}}})
    assert {answer.choices[0].message.content for answer in (part, exact, body)} == {own.text}
    assert {answer.usage.prompt_tokens for answer in (part, exact, body)} == {own.prompt_tokens}


def test_pictures_as_a_film(client: Any, films: Path) -> None:
    url = as_data(films / "picture.png", "image/png")
    messages = shows(url, kind="image_url")
    messages[0]["content"][:0] = [messages[0]["content"][0]] * 3
    apart = ask(client, messages)
    film = ask(client, messages, extra_body={"framefusion": {"cost": 0.4, "images_as_video": True}})
    assert film.usage.prompt_tokens < apart.usage.prompt_tokens  # two frames share the tokens of one
    raw = url.removeprefix("data:image/png;base64,")
    jpeg = ask(client, shows(f"data:video/jpeg;base64,{','.join([raw] * 4)}"))
    assert jpeg.choices[0].message.content == film.choices[0].message.content


# --- Conversations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "mine"])
def test_turns_go_on_behind_their_caches(client: Any, films: Path, pipeline: Pipeline, name: str | None) -> None:
    film = films / "film.mp4"
    session = pipeline.session()
    extra = {} if name is None else {"session_id": name}
    messages = shows(f"file://{film}", f"First, {name}?")
    request = Request(NEW, cost=0.4, temperature=0)
    turn = Turn("user", (Visual.VIDEO, f"First, {name}?"))
    for number, text in enumerate((f"First, {name}?", "And then?", "Why?")):
        if number:
            turn = Turn("user", (text,))
            messages.append({"role": "user", "content": text})
        own = session.ask([turn], [] if number else [film], request)
        answer = ask(client, messages, extra_body=extra)
        assert answer.choices[0].message.content == own.text
        details = answer.usage.prompt_tokens_details
        assert details.cached_tokens == session.records[-1].reused_tokens
        assert (details.cached_tokens > 0) == (number > 0)
        messages.append({"role": "assistant", "content": own.text})


def test_another_cost_or_film_is_another_conversation(client: Any, films: Path) -> None:
    messages = shows(f"file://{films}/film.mp4", "Another?")
    first = ask(client, messages)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    assert ask(client, messages, cost=0.6).usage.prompt_tokens_details.cached_tokens == 0
    messages[0]["content"][0]["video_url"]["url"] = f"file://{films}/other.mp4"
    assert ask(client, messages).usage.prompt_tokens_details.cached_tokens == 0


# --- Refusals, as the client sees them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "other"}, 404, "RequestError"),
        ({"n": 2}, 400, "RequestError"),
        ({"messages": shows("https://films.example/x.mp4")}, 403, "RequestError"),
        ({"messages": shows("file:///etc/passwd")}, 403, "RequestError"),
        ({"messages": shows("data:video/mp4;base64,AAAA")}, 400, "VideoError"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, 400, "PromptError"),
        ({"extra_body": {"framefusion": {"reducer": "none such"}}}, 400, "ReducerError"),
        ({"max_tokens": 0}, 400, "RequestError"),
    ],
)
def test_errors_have_openais_shape(client: Any, change: dict[str, Any], status: int, code: str) -> None:
    given = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **change}
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**given)
    assert refused.value.status_code == status
    assert refused.value.code == code
    assert refused.value.body["message"]


def test_what_there_is(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_langchain_streams_with_usage(server: Running, films: Path, pipeline: Pipeline) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", max_tokens=NEW, temperature=0, stream_usage=True,
        extra_body={"framefusion": {"cost": 0.4}},
    )  # fmt: skip
    film = films / "film.mp4"
    own = expected(pipeline, film)
    whole = None
    for piece in model.stream([("user", shows(f"file://{film}")[0]["content"])]):
        whole = piece if whole is None else whole + piece
    assert whole is not None
    assert whole.text == own.text
    assert whole.usage_metadata["input_tokens"] == own.prompt_tokens
