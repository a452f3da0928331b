"""A checkpoint's own chat template, a jinja program, turned into the plain strings that a runtime without jinja needs.

Conversations with marks for texts are rendered; what stands between the marks are the strings. Then other conversations
are rendered both ways: a template that the strings do not reproduce is refused, never approximated. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.text.template_rendering import Rendered, render
from framefusion.runtime.text.prompt import PromptTemplate, TurnLayout, Visual

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

SYSTEM = "SystemSays"
FIRST = "FirstQuestion"
ANSWER = "FirstAnswer"
SECOND = "SecondQuestion"
SPACED = f" \n{FIRST}\t "
FILES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

Message = tuple[str, tuple[str, ...]]
"""A role and its parts: texts, or "video" and "image" for a visual."""

Conversation = tuple[tuple[Message, ...], bool]
"""Messages, and whether the text ends where an answer begins."""


def read_template(
    checkpoint: Checkpoint,
    fallback: PromptTemplate,
    placeholders: Mapping[str, str] | None = None,
    source: str | None = None,
) -> PromptTemplate:
    """The chat layout of a checkpoint.

    Args:
        checkpoint: whose chat template is read.
        fallback: the layout where it brings none, and what no chat template says.
        placeholders: what the template writes for a "video" and an "image"; None for one that knows texts only.
        source: the template; None takes the one that a checkpoint brings where they all do.

    Raises:
        CheckpointError: the template is no jinja, or cannot be said in strings.
    """
    source = source or find_template(checkpoint)
    if source is None:
        return fallback
    template = _Template(checkpoint, source, placeholders)
    layout = _text_layout(template, fallback)
    if placeholders is not None:
        layout = _visual_layout(template, layout, placeholders)
    _compare(template, layout, placeholders)
    return replace(layout, strip=layout.strip or fallback.strip)  # a family may do it before its template is rendered


def find_template(checkpoint: Checkpoint) -> str | None:
    """The jinja source that a checkpoint brings, None where it has none."""
    path = checkpoint.find("chat_template.jinja")
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no text ({error}): download it again") from None
    for name in FILES:
        found = checkpoint.read_optional_json(name).get("chat_template")
        if isinstance(found, list):  # several, by name
            named = [entry for entry in found if isinstance(entry, Mapping)]
            found = {entry.get("name"): entry.get("template") for entry in named}
        if isinstance(found, dict):
            found = found.get("default")
        if found is not None and not isinstance(found, str):
            raise CheckpointError(f"{checkpoint.folder}/{name} has chat_template {found!r:.80}, expected a text")
        if found:
            return found
    return None


class _Template:
    """A checkpoint's template, rendered out of process; the conversations that every template gets go in one start."""

    def __init__(self, checkpoint: Checkpoint, source: str, placeholders: Mapping[str, str] | None) -> None:
        self.checkpoint = checkpoint
        self._source = source
        config = checkpoint.read_optional_json("tokenizer_config.json")
        self._tokens = [(name, _content(config.get(name))) for name in TOKENS]
        self._rendered: dict[Conversation, str | CheckpointError] = {}
        self._usual = _usual_conversations(placeholders)

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The conversation as text, ready for an answer or not."""
        conversation = (tuple(messages), answer)
        if conversation not in self._rendered:
            self._render(dict.fromkeys([*self._usual, conversation]))
        text = self._rendered[conversation]
        if isinstance(text, CheckpointError):
            raise text
        return text

    def _render(self, conversations: Collection[Conversation]) -> None:
        """Render conversations in both forms of a message: a processor's template reads parts, a tokenizer's texts."""
        requests: list[tuple[Any, bool]] = []
        for messages, answer in conversations:
            requests.append(([{"role": role, "content": _as_parts(parts)} for role, parts in messages], answer))
            requests.append(([{"role": role, "content": _as_text(parts)} for role, parts in messages], answer))
        try:
            rendered = render(self._source, self._tokens, requests)
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.folder}: {error}") from None
        for index, conversation in enumerate(conversations):
            self._rendered[conversation] = self._readable(conversation[0], rendered[2 * index : 2 * index + 2])

    def _readable(self, messages: Sequence[Message], forms: Sequence[Rendered]) -> str | CheckpointError:
        """The first form in which every text of the messages stands."""
        texts = [part for _, parts in messages for part in parts if part not in ("video", "image")]
        for text, _ in forms:
            if text is not None and "'type'" not in text and all(part.strip() in text for part in texts):
                return text
        reason = next((error for _, error in reversed(forms) if error), "text is lost")
        return CheckpointError(f"{self.checkpoint.folder}: its chat template cannot be rendered ({reason})")

    def refuse(self, why: str) -> CheckpointError:
        """The error of a template that strings cannot say."""
        return CheckpointError(
            f"{self.checkpoint.folder}: its chat template cannot be said in prefixes and suffixes ({why}): take it out "
            "of the checkpoint to build with the family's own layout"
        )


def _content(token: object) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _as_parts(parts: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"type": part} if part in ("video", "image") else {"type": "text", "text": part} for part in parts]


def _as_text(parts: tuple[str, ...]) -> str:
    return "".join(parts)


def _text_layout(template: _Template, fallback: PromptTemplate) -> PromptTemplate:
    """Turns of text: see the marks above for what is rendered."""
    question = ("user", (FIRST,))
    answer = ("assistant", (ANSWER,))
    # 1. What stands behind a question when an answer follows begins the answer: it must only add to the question.
    alone = template.render([question])
    prompted = template.render([question], answer=True)
    if not prompted.startswith(alone):
        raise template.refuse("the end of a turn changes when an answer follows")
    # 2. Ends of turns stand where nothing follows, so that they can be told from what begins the next turn.
    three_turns = template.render([question, answer, ("user", (SECOND,))])
    answered = template.render([question, answer])
    user_suffix = _behind(three_turns, SECOND)
    answer_suffix = _behind(answered, ANSWER)
    before_answer = _between(three_turns, FIRST, ANSWER)
    before_second = _between(three_turns, ANSWER, SECOND)
    if not before_answer.startswith(user_suffix) or not before_second.startswith(answer_suffix):
        raise template.refuse("a turn ends otherwise when another follows")
    # 3. The rest begins a turn; the first one may have more before it, which begins the prompt.
    user = TurnLayout(before_second[len(answer_suffix) :], user_suffix)
    head = alone[: alone.index(FIRST)]
    if not head.endswith(user.prefix):
        raise template.refuse("the first question begins otherwise than the next")
    turns = {"user": user, "assistant": TurnLayout(before_answer[len(user_suffix) :], answer_suffix)}
    # 4. White space around a text stays or goes: a layout knows nothing between the two.
    spaced = template.render([("user", (SPACED,))])
    strip = spaced == alone
    if not strip and spaced != alone.replace(FIRST, SPACED):
        raise template.refuse("white space around what a user says is changed, and not all of it left out")
    # 5. The system's turn, and what it says where nobody gives one.
    begin, default, system = _system(template, head[: len(head) - len(user.prefix)], user)
    if system is not None:
        turns["system"] = system
    generation_prefix = prompted[len(alone) :]
    return replace(
        fallback,
        turns=turns,
        generation_prefix=generation_prefix,
        begin=begin,
        default_system=default,
        strip=strip,
    )


def _behind(text: str, mark: str) -> str:
    return text[text.index(mark) + len(mark) :]


def _between(text: str, mark: str, next_mark: str) -> str:
    return text[text.index(mark) + len(mark) : text.index(next_mark)]


def _system(template: _Template, head: str, user: TurnLayout) -> tuple[str, str, TurnLayout | None]:
    """What begins a prompt, the system's default text, and the layout of its turn; None where it cannot speak.

    `head` is what stands before the first user turn of a conversation without a system turn.
    """
    try:
        with_system = template.render([("system", (SYSTEM,)), ("user", (FIRST,))])
    except CheckpointError:
        return head, "", None
    if with_system.count(SYSTEM) != 1:  # LLaVA-NeXT-Video's Vicuna template says it twice
        return head, "", None
    before = with_system[: with_system.index(SYSTEM)]
    between = _between(with_system, SYSTEM, FIRST)
    if not between.endswith(user.prefix):
        raise template.refuse("a question begins otherwise after a system turn")
    suffix = between[: len(between) - len(user.prefix)]
    bos = _content(template.checkpoint.read_optional_json("tokenizer_config.json").get("bos_token"))
    if before.startswith(head):  # no system turn unless one is given
        return head, "", TurnLayout(before[len(head) :], suffix)
    begin = bos if bos and head.startswith(bos) and before.startswith(bos) else ""
    layout = TurnLayout(before[len(begin) :], suffix)
    if not head.startswith(before) or not head.endswith(suffix):
        raise template.refuse("its default system turn is laid out otherwise than a given one")
    return begin, head[len(before) : len(head) - len(suffix)], layout


def _visual_layout(template: _Template, layout: PromptTemplate, placeholders: Mapping[str, str]) -> PromptTemplate:
    """Where a user's videos stand, and what separates them from the text."""
    video = placeholders["video"]
    single = template.render([("user", ("video", FIRST))])
    double = template.render([("user", ("video", "video", FIRST))])
    if single.count(video) != 1 or double.count(video) != 2:
        raise template.refuse(f"{video} does not stand for a video")
    # 1. What stands between two videos follows every video.
    after_visual = _behind(double, video)
    after_visual = after_visual[: after_visual.index(video)]
    # 2. A turn begins with what stands before its first part; what a text has beside that stands before each text.
    user = layout.turns["user"]
    before_text = _between(single, video, FIRST)
    without_video = template.render([("user", (FIRST,))])
    head = without_video[: without_video.index(FIRST)]
    start = head[: -len(user.prefix) or None]
    prefix = single[len(start) : single.index(video)]
    if not before_text.startswith(after_visual) or not user.prefix.startswith(prefix):
        raise template.refuse("a turn with a video begins otherwise than one without")
    turns = dict(layout.turns) | {"user": TurnLayout(prefix, user.suffix, text_prefix=user.prefix[len(prefix) :])}
    # 3. Some templates put visuals before texts, and images before videos, in whatever order they are given.
    text_first = template.render([("user", (FIRST, "video"))])
    mixed = template.render([("user", ("video", "image", FIRST))])
    visuals_first = text_first.index(video) < text_first.index(FIRST)
    images_first = visuals_first and -1 < mixed.find(placeholders["image"]) < mixed.index(video)
    return replace(
        layout, turns=turns, after_visual=after_visual, visuals_first=visuals_first, images_first=images_first
    )


def _compare(template: _Template, layout: PromptTemplate, placeholders: Mapping[str, str] | None) -> None:
    """Refuse strings that do not give what the template gives."""
    for case in _cases(placeholders, system="system" in layout.turns):
        ours = compose(layout, case, placeholders or {})
        theirs = template.render(case, answer=True)
        if ours != theirs:
            raise template.refuse(f"{theirs!r} would be {ours!r}")


def _cases(placeholders: Mapping[str, str] | None, *, system: bool) -> list[list[Message]]:
    """Conversations that both ways must write the same, with and without what the layout may not have."""
    long: list[Message] = [("user", ("Aa b?",)), ("assistant", ("Cc.",)), ("user", ("Dd",)), ("assistant", ("Ee",))]
    cases: list[list[Message]] = [long[:1], long[:3], [("user", ("Ff g",)), *long[1:], ("user", ("Hh",))]]
    cases.append([("user", (SPACED,))])
    if system:
        cases.append([("system", ("Be brief.",)), *long[:3]])
    if placeholders is not None:
        cases += [
            [("user", (*kinds, "Ii"))]
            for kinds in (("video",), ("image",), ("video", "video"), ("image", "image"), ("video", "image"))
        ]
        cases.append([("user", ("video", SPACED))])
        cases.append([("user", ("video", "Jj")), ("assistant", ("Kk",)), ("user", ("image", "Ll"))])
    return cases


def _usual_conversations(placeholders: Mapping[str, str] | None) -> list[Conversation]:
    """All that is rendered of a template that can be said in strings, and whether an answer follows."""
    question: Message = ("user", (FIRST,))
    answer: Message = ("assistant", (ANSWER,))
    conversations: list[Conversation] = [((question,), True)]
    turns: list[tuple[Message, ...]] = [
        (question,),
        (question, answer),
        (question, answer, ("user", (SECOND,))),
        (("system", (SYSTEM,)), question),
        (("user", (SPACED,)),),
    ]
    if placeholders is not None:
        shown = (("video", FIRST), ("video", "video", FIRST), (FIRST, "video"), ("video", "image", FIRST))
        turns += [(("user", parts),) for parts in shown]
    conversations += [(messages, False) for messages in turns]
    return conversations + [(tuple(case), True) for case in _cases(placeholders, system=True)]


def compose(layout: PromptTemplate, messages: Sequence[Message], placeholders: Mapping[str, str]) -> str:
    """A conversation in the strings of a layout, ready for an answer."""
    if layout.default_system and messages[0][0] != "system":
        messages = [("system", (layout.default_system,)), *messages]
    pieces = [layout.begin]
    for role, parts in messages:
        turn = layout.turns[role]
        if layout.visuals_first:
            parts = tuple(sorted(parts, key=lambda part: layout.rank(Visual(part) if part in placeholders else part)))
        if layout.strip:
            parts = _without_leading_space(parts, placeholders)
        shown = [
            placeholders[part] + layout.after_visual if part in placeholders else turn.text_prefix + part
            for part in parts
        ]
        content = layout.part_separator.join(shown)
        pieces += [turn.prefix, content.rstrip() if layout.strip else content, turn.suffix]
    return "".join([*pieces, layout.generation_prefix])


def _without_leading_space(parts: tuple[str, ...], placeholders: Mapping[str, str]) -> tuple[str, ...]:
    while parts and parts[0] not in placeholders and not parts[0].strip():
        parts = parts[1:]
    return parts if not parts or parts[0] in placeholders else (parts[0].lstrip(), *parts[1:])
