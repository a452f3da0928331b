"""Chat templates of checkpoints as plain strings: equal to jinja on conversations, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framefusion.errors import CheckpointError
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.families.chat import Message, compose, find_template, read_template
from framefusion.export.families.family import CHATML
from framefusion.export.families.reading import QWEN_PLACEHOLDERS
from framefusion.runtime.prompt import PromptTemplate

QWEN2_VL = (Path(__file__).parents[1] / "models/tiny_qwen2_vl/chat_template.jinja").read_text()
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
    assert read_template(checkpoint(tmp_path, QWEN2_VL, name), CHATML, QWEN_PLACEHOLDERS) == CHATML


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
            QWEN_PLACEHOLDERS,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            QWEN3_VL.replace("THOUGHT", "<think>\n"),  # thoughts of earlier answers are left out
            QWEN_PLACEHOLDERS,
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
