"""Chat templates of checkpoints as plain strings: equal to jinja on conversations, or refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.text.chat import Message, compose, find_template, read_template
from framefusion.export.checkpoints.text.template_rendering import render
from framefusion.export.families.family import CHATML
from framefusion.export.families.qwen2_vl.reading import PLACEHOLDERS
from framefusion.runtime.text.prompt import PromptTemplate
from tests.tiers import in_tiers
from tests.wheel import ROOT

QWEN2_VL = (ROOT / "tests" / "models/tiny_qwen2_vl/chat_template.jinja").read_text()
# Layouts in use, each written here in the shortest jinja that gives it.
CHATML_TEXT = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}"
    "ASSISTANT: {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VISUALS_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% for c in m.content if c.type != 'text' %}<{{ c.type }}>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ '\\n' + c.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_VL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}THOUGHT{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% else %}<|vision_start|><|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nTHOUGHT{% endif %}"
)
ANGLE = {"video": "<video>", "image": "<image>"}


def checkpoint(folder: Path, template: object, name: str = "tokenizer_config.json") -> Checkpoint:
    (folder / "config.json").write_text("{}")
    if name.endswith(".jinja"):
        (folder / name).write_text(str(template))
    else:
        (folder / name).write_text(json.dumps({"chat_template": template, "bos_token": {"content": "<s>"}}))
    return Checkpoint(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_the_family_s_own_layout_is_the_published_template_s(name: str, tmp_path: Path) -> None:
    assert read_template(checkpoint(tmp_path, QWEN2_VL, name), CHATML, PLACEHOLDERS) == CHATML


def test_a_checkpoint_without_a_template_keeps_the_family_s(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_template(Checkpoint(tmp_path)) is None
    assert read_template(Checkpoint(tmp_path), CHATML) is CHATML


def test_of_several_templates_the_default_counts(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML_TEXT}]
    assert read_template(checkpoint(tmp_path, several), CHATML).default_system == "Be kind."


@pytest.mark.parametrize(
    ("template", "placeholders", "said"),
    [
        (
            CHATML_TEXT,
            None,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (WITHOUT_SYSTEM, None, "<s>USER: Hi ASSISTANT:"),
        (
            VISUALS_FIRST,
            ANGLE,
            "<|im_start|>user \nHi<|im_end|><|im_start|>assistant\n",
        ),
        (
            QWEN3_VL.replace("THOUGHT", ""),
            PLACEHOLDERS,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            QWEN3_VL.replace("THOUGHT", "<think>\n"),  # thoughts of earlier answers are left out
            PLACEHOLDERS,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
    ],
)
def test_layouts(template: str, placeholders: dict[str, str] | None, said: str, tmp_path: Path) -> None:
    layout = read_template(checkpoint(tmp_path, template), PromptTemplate({}, ""), placeholders)
    assert compose(layout, [("user", ("Hi",))], placeholders or {}) == said


def test_videos_may_stand_before_all_text(tmp_path: Path) -> None:
    layout = read_template(checkpoint(tmp_path, VISUALS_FIRST), PromptTemplate({}, ""), ANGLE)
    assert (layout.visuals_first, layout.after_visual, layout.turns["user"].text_prefix) == (True, "\n", "\n")
    question: list[Message] = [("user", ("Hi", "video"))]
    assert compose(layout, question, ANGLE) == ("<|im_start|>user <video>\n\nHi<|im_end|><|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ loop.index }}{{ m.content }};{% endfor %}", "the first question begins otherwise"),
        (
            "{% for m in messages %}{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}",
            "begins otherwise",
        ),
        ("{% for m in messages %}{{ m.content", "cannot be rendered"),
        ("nothing", "text is lost"),
        (CHATML_TEXT.replace("{{ m.content }}", "{{ m.content | upper }}"), "text is lost"),
        (CHATML_TEXT.replace("Be kind.", "{{ messages | length }}"), "would be"),
    ],
)
def test_what_strings_cannot_say_is_refused(template: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=why):
        read_template(checkpoint(tmp_path, template), CHATML)


TRIMMED = CHATML_TEXT.replace("{{ m.content }}", "{{ m.content | trim }}")
LOOP = "{% for i in range(99999) %}"
FEATURES = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 9 %}{% break %}{% endif %}"
    "{% generation %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endgeneration %}\n"
    "{%- endfor %}{{ '' if tools is none else tools | tojson }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "source", in_tiers([QWEN2_VL, FEATURES, CHATML_TEXT, WITHOUT_SYSTEM, VISUALS_FIRST, QWEN3_VL, TRIMMED], fast=2)
)
def test_the_process_renders_as_transformers_does(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    parts = [{"type": "video"}, {"type": "text", "text": "Hi <b> & \u00e9"}]
    content: list[object] = ["Hi", parts]
    for item, answer in itertools.product(content, (True, False)):
        messages = [{"role": "user", "content": item}]
        try:
            expected = render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=answer, bos_token="s"
            )
            theirs = expected[0][0]
        except Exception:  # of jinja2, whose template has no such form
            theirs = None
        assert render(source, [("bos_token", "s")], [(messages, answer)])[0].text == theirs


def test_white_space_is_left_out_where_the_template_does(tmp_path: Path) -> None:
    assert read_template(checkpoint(tmp_path, TRIMMED), CHATML).strip
    assert not read_template(checkpoint(tmp_path, CHATML_TEXT), CHATML).strip
    with pytest.raises(CheckpointError, match="white space around what a user says is changed"):
        read_template(checkpoint(tmp_path, TRIMMED.replace("trim", "replace('\\t', '')")), CHATML)


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "512 MiB of memory"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        pytest.param("{{ 10**(10**9) }}", "3 seconds of the processor", marks=pytest.mark.slow),
        pytest.param(f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}", "3 seconds of the processor", marks=pytest.mark.slow),
        pytest.param(
            f"{{% set ns = namespace(s='ab') %}}{LOOP}{{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}",
            "512 MiB of memory",
            marks=pytest.mark.slow,
        ),
        ("{{ '%09999999999d' | format(1) }}", "512 MiB of memory"),
        ("{{ 'ab' | center(300000) }}", "writes more than 262144 characters"),
        ("{{ strftime_now('%d %b %Y') }}", "strftime_now, today's date, which a bundle would freeze"),
        ("{{ ['a', 'b'] | random }}", "the filter random"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("x" * 300_000, "has 3[0-9]{5} characters, the limit is 262144"),
    ],
)
def test_hostile_templates_end_in_an_error(attack: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=why):
        read_template(checkpoint(tmp_path, attack + CHATML_TEXT, "chat_template.jinja"), CHATML)


def test_a_date_that_is_not_written_is_no_matter(tmp_path: Path) -> None:
    source = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + CHATML_TEXT
    assert read_template(checkpoint(tmp_path, source), CHATML).default_system == "Be kind."


@pytest.mark.parametrize("found", [5, {"default": 5}, [{"name": "default", "template": 7}]])
def test_templates_that_are_no_text_are_refused(found: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has chat_template .*, expected a text"):
        find_template(checkpoint(tmp_path, found))
