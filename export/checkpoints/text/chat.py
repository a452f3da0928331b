"""A checkpoint's own chat template, a jinja program, turned into the plain strings that a runtime without jinja needs.

Conversations with marks for texts are rendered; what stands between the marks are the strings. Then other conversations
are rendered both ways: a template that the strings do not reproduce is refused, never approximated. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""A role and its parts: texts, or the words video and image for a visual."""


def read_template(
    checkpoint: Checkpoint,
    fallback: PromptTemplate,
    placeholders: Mapping[str, str] | None = None,
    source: str | None = None,
) -> PromptTemplate:
    """The chat layout of a checkpoint.

    Args:
        checkpoint: whose chat template is read.
        fallback: the layout where it brings none, and what no chat template tells.
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
    """A checkpoint's template, rendered out of process; the conversations that are always asked go in one start."""

    def __init__(self, checkpoint: Checkpoint, source: str, placeholders: Mapping[str, str] | None) -> None:
        self.checkpoint = checkpoint
        self._source = source
        told = checkpoint.read_optional_json("tokenizer_config.json")
        self._tokens = [(name, _content(told.get(name))) for name in TOKENS]
        self._rendered: dict[tuple[tuple[Message, ...], bool], str | CheckpointError] = {}
        self._usual = _usual_conversations(placeholders)

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The conversation as text, ready for an answer or not."""
        asked = (tuple(messages), answer)
        if asked not in self._rendered:
            self._render([*self._usual, asked] if asked not in self._usual else self._usual)
        found = self._rendered[asked]
        if isinstance(found, CheckpointError):
            raise found
        return found

    def _render(self, asked: Sequence[tuple[tuple[Message, ...], bool]]) -> None:
        """Render conversations in both forms of a message: a processor's template reads parts, a tokenizer's texts."""
        conversations = [
            ([{"role": role, "content": form(parts)} for role, parts in messages], answer)
            for messages, answer in asked
            for form in (_as_parts, _as_text)
        ]
        try:
            found = render(self._source, self._tokens, conversations)
        except CheckpointError as error:
            raise CheckpointError(f"{self.checkpoint.folder}: {error}") from None
        for index, key in enumerate(asked):
            self._rendered[key] = self._readable(key[0], found[2 * index : 2 * index + 2])

    def _readable(self, messages: Sequence[Message], forms: Sequence[Rendered]) -> str | CheckpointError:
        """The first form in which all that was said can be found."""
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


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token or "")


def _as_parts(parts: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"type": part} if part in ("video", "image") else {"type": "text", "text": part} for part in parts]


def _as_text(parts: tuple[str, ...]) -> str:
    return "".join(parts)


def _text_layout(template: _Template, fallback: PromptTemplate) -> PromptTemplate:
    """Turns of text: see the marks above for what is rendered."""
    question = ("user", (FIRST,))
    answer = ("assistant", (ANSWER,))
    alone = template.render([question])
    asked = template.render([question], answer=True)
    long = template.render([question, answer, ("user", (SECOND,))])
    if not asked.startswith(alone):
        raise template.refuse("the end of a turn changes when an answer follows")
    user_suffix = long[long.index(SECOND) + len(SECOND) :]
    between = long[long.index(FIRST) + len(FIRST) : long.index(ANSWER)]
    after = long[long.index(ANSWER) + len(ANSWER) : long.index(SECOND)]
    said = template.render([question, answer])
    answer_suffix = said[said.index(ANSWER) + len(ANSWER) :]
    if not between.startswith(user_suffix) or not after.startswith(answer_suffix):
        raise template.refuse("a turn ends otherwise when another follows")
    user = TurnLayout(after[len(answer_suffix) :], user_suffix)
    head = alone[: alone.index(FIRST)]
    if not head.endswith(user.prefix):
        raise template.refuse("the first question begins otherwise than the next")
    turns = {"user": user, "assistant": TurnLayout(between[len(user_suffix) :], answer_suffix)}
    spaced = template.render([("user", (SPACED,))])
    strip = spaced == alone
    if not strip and spaced != alone.replace(FIRST, SPACED):
        raise template.refuse("white space around what a user says is changed, and not all of it left out")
    begin, default, system = _system(template, head[: len(head) - len(user.prefix)], user)
    if system is not None:
        turns["system"] = system
    generation_prefix = asked[len(alone) :]
    return replace(
        fallback,
        turns=turns,
        generation_prefix=generation_prefix,
        begin=begin,
        default_system=default,
        strip=strip,
    )


def _system(template: _Template, head: str, user: TurnLayout) -> tuple[str, str, TurnLayout | None]:
    """What begins a prompt, the system's default words, and the layout of its turn; None where it cannot speak.

    `head` is what stands before the first user turn of a conversation without a system turn.
    """
    try:
        told = template.render([("system", (SYSTEM,)), ("user", (FIRST,))])
    except CheckpointError:
        return head, "", None
    if told.count(SYSTEM) != 1:  # LLaVA-NeXT-Video's Vicuna template says it twice
        return head, "", None
    before = told[: told.index(SYSTEM)]
    between = told[told.index(SYSTEM) + len(SYSTEM) : told.index(FIRST)]
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
    one = template.render([("user", ("video", FIRST))])
    two = template.render([("user", ("video", "video", FIRST))])
    later = template.render([("user", (FIRST, "video"))])
    if one.count(video) != 1 or two.count(video) != 2:
        raise template.refuse(f"{video} does not stand for a video")
    first = two.index(video) + len(video)
    after_visual = two[first : two.index(video, first)]
    user = layout.turns["user"]
    text = one[one.index(video) + len(video) : one.index(FIRST)]
    head = template.render([("user", (FIRST,))])
    start = head[: head.index(FIRST)][: -len(user.prefix) or None]
    prefix = one[len(start) : one.index(video)]
    if not text.startswith(after_visual) or not user.prefix.startswith(prefix):
        raise template.refuse("a turn with a video begins otherwise than one without")
    turns = dict(layout.turns) | {"user": TurnLayout(prefix, user.suffix, text_prefix=user.prefix[len(prefix) :])}
    mixed = template.render([("user", ("video", "image", FIRST))])
    visuals_first = later.index(video) < later.index(FIRST)
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


def _usual_conversations(placeholders: Mapping[str, str] | None) -> list[tuple[tuple[Message, ...], bool]]:
    """All that is rendered of a template that can be said in strings, and whether an answer follows."""
    question: Message = ("user", (FIRST,))
    answer: Message = ("assistant", (ANSWER,))
    asked: list[tuple[tuple[Message, ...], bool]] = [((question,), True)]
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
    asked += [(conversation, False) for conversation in turns]
    return asked + [(tuple(case), True) for case in _cases(placeholders, system=True)]


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
        said = layout.part_separator.join(shown)
        pieces += [turn.prefix, said.rstrip() if layout.strip else said, turn.suffix]
    return "".join([*pieces, layout.generation_prefix])


def _without_leading_space(parts: tuple[str, ...], placeholders: Mapping[str, str]) -> tuple[str, ...]:
    while parts and parts[0] not in placeholders and not parts[0].strip():
        parts = parts[1:]
    return parts if not parts or parts[0] in placeholders else (parts[0].lstrip(), *parts[1:])
