"""A checkpoint's own chat template, a jinja program, turned into the plain strings that a runtime without jinja needs.

Conversations with marks for texts are rendered; what stands between the marks are the strings. Then other conversations
are rendered both ways: a template that the strings do not reproduce is refused, never approximated. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.runtime.prompt import PromptTemplate, TurnLayout, Visual

if TYPE_CHECKING:
    from framefusion.export.checkpoint import Checkpoint

SYSTEM, FIRST, ANSWER, SECOND = "SystemSays", "FirstQuestion", "FirstAnswer", "SecondQuestion"
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
    template = _Template(checkpoint, source)
    layout = _text_layout(template, fallback)
    if placeholders is not None:
        layout = _visual_layout(template, layout, placeholders)
    _compare(template, layout, placeholders)
    return layout


def find_template(checkpoint: Checkpoint) -> str | None:
    """The jinja source that a checkpoint brings, None where it has none."""
    path = checkpoint.find("chat_template.jinja")
    if path is not None:
        return path.read_text(encoding="utf-8")
    for name in FILES:
        found = checkpoint.read_optional_json(name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}
        if isinstance(found, dict):
            found = found.get("default")
        if found:
            return str(found)
    return None


@dataclass(frozen=True)
class _Template:
    checkpoint: Checkpoint
    source: str

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """The conversation as text, ready for an answer or not."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        told = self.checkpoint.read_optional_json("tokenizer_config.json")
        tokens: dict[str, Any] = {name: _content(told.get(name)) for name in TOKENS}
        error: Exception | None = None
        for form in (_as_parts, _as_text):  # a processor's template reads parts, a tokenizer's texts
            try:
                conversation = [{"role": role, "content": form(parts)} for role, parts in messages]
                rendered = render_jinja_template(
                    [conversation], chat_template=self.source, add_generation_prompt=answer, **tokens
                )[0][0]
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as problem:
                error = problem
                continue
            texts = [part for _, parts in messages for part in parts if part not in ("video", "image")]
            if "'type'" not in rendered and all(text in rendered for text in texts):
                return str(rendered)
        raise CheckpointError(
            f"{self.checkpoint.folder}: its chat template cannot be rendered ({error or 'text is lost'})"
        )

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
    question, answer = ("user", (FIRST,)), ("assistant", (ANSWER,))
    alone, asked = template.render([question]), template.render([question], answer=True)
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
    begin, default, system = _system(template, head[: len(head) - len(user.prefix)], user)
    if system is not None:
        turns["system"] = system
    generation_prefix = asked[len(alone) :]
    return replace(fallback, turns=turns, generation_prefix=generation_prefix, begin=begin, default_system=default)


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
    before, between = told[: told.index(SYSTEM)], told[told.index(SYSTEM) + len(SYSTEM) : told.index(FIRST)]
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
    one, two = template.render([("user", ("video", FIRST))]), template.render([("user", ("video", "video", FIRST))])
    later = template.render([("user", (FIRST, "video"))])
    if one.count(video) != 1 or two.count(video) != 2:
        raise template.refuse(f"{video} does not stand for a video")
    first = two.index(video) + len(video)
    after_visual = two[first : two.index(video, first)]
    user, text = layout.turns["user"], one[one.index(video) + len(video) : one.index(FIRST)]
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
    long: list[Message] = [("user", ("Aa b?",)), ("assistant", ("Cc.",)), ("user", ("Dd",)), ("assistant", ("Ee",))]
    cases: list[list[Message]] = [long[:1], long[:3], [("user", ("Ff g",)), *long[1:], ("user", ("Hh",))]]
    if "system" in layout.turns:
        cases.append([("system", ("Be brief.",)), *long[:3]])
    if placeholders is not None:
        cases += [
            [("user", (*kinds, "Ii"))]
            for kinds in (("video",), ("image",), ("video", "video"), ("image", "image"), ("video", "image"))
        ]
        cases.append([("user", ("video", "Jj")), ("assistant", ("Kk",)), ("user", ("image", "Ll"))])
    for case in cases:
        ours, theirs = compose(layout, case, placeholders or {}), template.render(case, answer=True)
        if ours != theirs:
            raise template.refuse(f"{theirs!r} would be {ours!r}")


def compose(layout: PromptTemplate, messages: Sequence[Message], placeholders: Mapping[str, str]) -> str:
    """A conversation in the strings of a layout, ready for an answer."""
    if layout.default_system and messages[0][0] != "system":
        messages = [("system", (layout.default_system,)), *messages]
    pieces = [layout.begin]
    for role, parts in messages:
        turn = layout.turns[role]
        if layout.visuals_first:
            parts = tuple(sorted(parts, key=lambda part: layout.rank(Visual(part) if part in placeholders else part)))
        shown = [
            placeholders[part] + layout.after_visual if part in placeholders else turn.text_prefix + part
            for part in parts
        ]
        pieces += [turn.prefix, layout.part_separator.join(shown), turn.suffix]
    return "".join([*pieces, layout.generation_prefix])
