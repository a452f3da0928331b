"""LLaVA-OneVision and LLaVA-NeXT-Video against transformers' own classes, with the counts of its processors."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Prompt, Turn
from tests.families import llava_checkpoints as tiny
from tests.families.case import Array, Media, Reference
from tests.families.llava import LlavaCase, config_of, resized, tokenizer_of

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for kind in ('image', 'video') %}{% for content in message['content'] | selectattr('type', 'equalto', kind) %}"
    "{{ '<' + kind + '>\n' }}{% endfor %}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPACED = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for kind in ('image', 'video') %}{% for content in message['content'] | selectattr('type', 'equalto', kind) %}"
    "{{ '<' + kind + '>' }}{% endfor %}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for kind in ('image', 'video') %}{% for content in message['content'] | selectattr('type', 'equalto', kind) %}"
    "{{ '<' + kind + '>\n' }}{% endfor %}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for kind in ('image', 'video') %}{% for content in message['content'] | selectattr('type', 'equalto', kind) %}"
    "{{ '<' + kind + '>\n' }}{% endfor %}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""As the released checkpoints and their conversion scripts lay out a conversation."""


class HfCase(LlavaCase):
    """A family of transformers' own."""

    model: ClassVar[str]
    begin: ClassVar[str] = ""

    def reference(self, folder: Path) -> Reference:
        return HfReference(self, folder)

    def normalised(self, pixels: Array) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (tiny.MEAN, tiny.STD))
        return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0 - mean) / std

    @abstractmethod
    def processor(self) -> Any:
        """transformers' processor with what its counting needs; its constructor wants a video processor."""

    def is_row(self, folder: Path, index: int) -> bool:
        return index in (config_of(folder)["image_token_index"], config_of(folder)["video_token_index"])

    def prompt_ids(self, folder: Path, turns: Sequence[Turn], media: Sequence[Media]) -> list[int]:
        """The chat template, the counts of tokens that the processor puts in, the tokenizer; learned rows marked."""
        messages, tokenizer, processor = [], tokenizer_of(folder), self.processor()
        for turn in turns:
            parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.value} for p in turn.parts]
            messages.append({"role": turn.role, "content": parts})
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        images = self.images(media) if any(not isinstance(item, Video) for item in media) else {}
        if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
            pytest.skip("this transformers has no method that counts the tokens of one image")
        videos = {"pixel_values_videos": [self.video(item) for item in media if isinstance(item, Video)]}
        shown = [
            processor.replace_video_token(videos, place)
            if isinstance(item, Video)
            else processor.replace_image_token(images, place)
            for place, item in places(media)
        ]
        waiting = iter(shown)
        text = re.sub("<image>|<video>", lambda _: next(waiting), text)
        ids: list[int] = tokenizer(text).input_ids
        for layout, start in zip(*self.runs(folder, ids, media), strict=True):
            for place, newline in enumerate(layout):
                assert self.is_row(folder, ids[start + place])
                ids[start + place] = -2 if newline else ids[start + place]
        assert ids.count(-2) + sum(self.is_row(folder, i) for i in ids) == sum(map(len, self.layouts(folder, media)))
        return ids


def places(media: Sequence[Media]) -> list[tuple[int, Media]]:
    """Each visual with its number among those of its kind."""
    kinds = [isinstance(item, Video) for item in media]
    return [(kinds[:i].count(kinds[i]), item) for i, item in enumerate(media)]


class HfReference(Reference):
    """The class itself."""

    def __init__(self, case: HfCase, folder: Path) -> None:
        import transformers

        self.case, self.folder = case, folder
        load = getattr(transformers, case.model).from_pretrained
        self.model, loading = load(folder, dtype=torch.float32, output_loading_info=True)
        assert not {*loading["missing_keys"], *loading["unexpected_keys"]}
        self.model.eval()

    def inputs(self, media: Sequence[Media]) -> dict[str, Any]:
        """Images of one conversation, as the class takes them."""
        images = self.case.images(media)
        most = max(map(len, images["pixel_values"]))
        padded = [nn.functional.pad(values, (0, 0) * 3 + (0, most - len(values))) for values in images["pixel_values"]]
        inputs = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(images["image_sizes"])}
        return inputs if self.case.each else inputs | {"batch_num_images": torch.tensor(images["batch_num_images"])}

    def rows(self, media: Sequence[Media]) -> list[Tensor]:
        """Rows of each visual, learned ones among them."""
        shown = any(not isinstance(item, Video) for item in media)
        images = iter(self.model.get_image_features(**self.inputs(media)).pooler_output if shown else [])
        found = [
            self.model.get_video_features(self.case.video(item)[None]).pooler_output[0]
            if isinstance(item, Video)
            else next(images)
            for item in media
        ]
        return [rows.flatten(0, -2) for rows in found]  # before transformers 5.17 a video's rows lie by frame

    def features(self, media: Sequence[Media]) -> Array:
        with torch.inference_mode():
            both = zip(self.rows(media), self.case.layouts(self.folder, media), strict=True)
            kept = [rows[~torch.tensor(learned)] for rows, learned in both]
        features: Array = torch.cat(kept).numpy()
        return features

    def logits(self, prompt: Prompt, media: Sequence[Media], answer: Sequence[int]) -> Array:
        ids = torch.tensor([*prompt.token_ids, *answer])
        for place in torch.nonzero(ids < 0).flatten().tolist():  # a learned row follows a row of its visual
            ids[place] = ids[place - 1]
        videos = [self.case.video(item) for item in media if isinstance(item, Video)]
        pads = [self.case.is_row(self.folder, i) for i in ids.tolist()]
        shown = prompt.token_ids.size
        with torch.inference_mode():
            if len({len(video) for video in videos}) > 1 or any(pads[shown:]):
                # the class takes videos of one length, and counts pad tokens that an answer says
                embedded = self.model.get_input_embeddings()(ids)
                index = torch.tensor(pads[:shown] + [False] * len(answer))
                embedded[index] = torch.cat(self.rows(media))
                return self.model(inputs_embeds=embedded[None]).logits[0].numpy()  # type: ignore[no-any-return]
            inputs = self.inputs(media) if len(videos) < len(media) else {}
            if videos:
                inputs["pixel_values_videos"] = torch.stack(videos)
            return self.model(input_ids=ids[None], **inputs).logits[0].numpy()  # type: ignore[no-any-return]


class LlavaOnevisionCase(HfCase):
    """LlavaOnevisionForConditionalGeneration."""

    family = "llava_onevision"
    model = "LlavaOnevisionForConditionalGeneration"
    kind = "siglip"
    variants = ("as_saved", "infix_fp16_spaced", "module_names_bf16_shards", "tied")

    def write(self, folder: Path, variant: str) -> None:
        variants: dict[str, dict[str, Any]] = {
            "as_saved": {},
            "infix_fp16_spaced": {"names": "infix", "dtype": "float16", "template": SPACED},
            "module_names_bf16_shards": {"names": "model", "dtype": "bfloat16", "shards": 2},
            "tied": {"tied": True, "vision_feature_layer": -2},
        }
        template = variants[variant].pop("template", CHATML)
        tiny.write_hf(folder, "LlavaOnevision", template, vision_aspect_ratio="anyres_max_2", **variants[variant])

    def image_processor(self) -> Any:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        size = {"height": self.side, "width": self.side}
        return LlavaOnevisionImageProcessorPil(
            size=size, image_mean=tiny.MEAN, image_std=tiny.STD, image_grid_pinpoints=tiny.tilings(self.side)
        )

    def processor(self) -> Any:
        from transformers import LlavaOnevisionProcessor

        processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        processor.num_image_tokens, processor.vision_feature_select_strategy = self.patches**2, "full"
        processor.image_token, processor.video_token = "<image>", "<video>"
        processor.vision_aspect_ratio, processor.image_processor = "anyres_max_2", self.image_processor()
        return processor

    def frame(self, frame: Array) -> Array:
        return resized(frame, self.side, self.side)

    def pooled(self, folder: Path) -> int:
        return (self.patches + 1) // 2

    def newlines(self, folder: Path) -> str:
        return "one_token"

    def max_tiles(self, folder: Path) -> int:
        return 2

    def indices(self, total_frames: int, fps: float) -> list[int]:
        return uniform(total_frames, fps, 32)


class LlavaNextVideoCase(HfCase):
    """LlavaNextVideoForConditionalGeneration."""

    family = "llava_next_video"
    model = "LlavaNextVideoForConditionalGeneration"
    kind = "clip"
    each = True
    variants = ("vicuna", "mistral_infix_fp16", "module_names_bf16_shards", "tied")

    def write(self, folder: Path, variant: str) -> None:
        variants: dict[str, dict[str, Any]] = {
            "vicuna": {"text": "llama", "begin": "<|endoftext|>", "words": "first"},
            "mistral_infix_fp16": {
                "text": "mistral",
                "names": "infix",
                "dtype": "float16",
                "template": MISTRAL,
                "words": "legacy",
            },
            "module_names_bf16_shards": {"text": "llama", "names": "model", "dtype": "bfloat16", "shards": 2},
            "tied": {"text": "llama", "tied": True, "template": CHATML},
        }
        template = variants[variant].pop("template", VICUNA)
        tiny.write_hf(folder, "LlavaNextVideo", template, **variants[variant])

    def image_processor(self) -> Any:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        return LlavaNextImageProcessorPil(
            size={"shortest_edge": self.side}, crop_size={"height": self.side, "width": self.side},
            image_mean=tiny.MEAN, image_std=tiny.STD, image_grid_pinpoints=tiny.tilings(self.side),
        )  # fmt: skip

    def processor(self) -> Any:
        from transformers import LlavaNextVideoProcessor

        processor = LlavaNextVideoProcessor.__new__(LlavaNextVideoProcessor)
        processor.patch_size, processor.num_additional_image_tokens = tiny.PATCH, 1
        processor.vision_feature_select_strategy = "default"
        processor.image_token, processor.video_token = "<image>", "<video>"
        processor.image_processor = self.image_processor()
        return processor

    def frame(self, frame: Array) -> Array:
        height, width, _ = frame.shape
        short = min(height, width)
        frame = resized(frame, self.side * height // short, self.side * width // short)
        top, left = (frame.shape[0] - self.side) // 2, (frame.shape[1] - self.side) // 2
        return frame[top : top + self.side, left : left + self.side]

    def pooled(self, folder: Path) -> int:
        return self.patches // 2

    def newlines(self, folder: Path) -> str:
        return "no_token"

    def max_tiles(self, folder: Path) -> int:
        return 999

    def indices(self, total_frames: int, fps: float) -> list[int]:
        return uniform(total_frames, fps, 8)


def uniform(total_frames: int, fps: float, most: int) -> list[int]:
    """transformers' own sampling, which refuses to take more frames than there are."""
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    metadata = VideoMetadata(total_num_frames=total_frames, fps=fps)
    return [int(place) for place in default_sample_indices_fn(metadata, num_frames=min(most, total_frames))]
