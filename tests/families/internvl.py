"""InternVL in both formats against InternVLForConditionalGeneration, its image processor, and SentencePiece itself."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Prompt, Turn, Visual
from tests.families.case import Array, FamilyCase, Media, Reference
from tests.families.internvl_checkpoints import (
    KV_HEADS,
    MAX_TILES,
    MEAN,
    NATIVE_FRAMES,
    PATCH,
    STD,
    SYSTEM,
    TILE,
    native_config,
    write_chat,
    write_native,
)

ROWS = (TILE // PATCH // 2) ** 2


def native_pictures(media: Media) -> Array:
    """Tiles [N, 3, S, S] by transformers' image processor; frames are not cut."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_mean=MEAN, image_std=STD, min_patches=1, max_patches=MAX_TILES,
        crop_to_patches=not isinstance(media, Video),
    )  # fmt: skip
    images = list(media.frames) if isinstance(media, Video) else [media]
    return np.asarray(processor(images=images, return_tensors="np")["pixel_values"])


def chat_pictures(media: Media) -> Array:
    """Tiles [N, 3, S, S] by the authors' procedure, in Pillow's own terms."""
    from PIL import Image

    if isinstance(media, Video):
        tiles = [Image.fromarray(frame).resize((TILE, TILE)) for frame in media.frames]
    else:
        image = Image.fromarray(media)
        columns, rows = chosen_grid(image.width, image.height)
        whole = image.resize((columns * TILE, rows * TILE))
        boxes = [(i % columns * TILE, i // columns * TILE) for i in range(rows * columns)]
        tiles = [whole.crop((x, y, x + TILE, y + TILE)) for x, y in boxes]
        if len(tiles) != 1:
            tiles.append(image.resize((TILE, TILE)))
    values: Array = np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32) / np.float32(255)
    values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return values.transpose(0, 3, 1, 2)


def chosen_grid(width: int, height: int) -> tuple[int, int]:
    """Columns and rows whose ratio is nearest to the image's; see `dynamic_preprocess` of the authors' examples."""
    grids = {(i, j) for i in range(1, MAX_TILES + 1) for j in range(1, MAX_TILES + 1) if i * j <= MAX_TILES}
    best, difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        found = abs(width / height - columns / rows)
        if found < difference:
            best, difference = (columns, rows), found
        elif found == difference and width * height > 0.5 * TILE * TILE * columns * rows:
            best = (columns, rows)
    return best


class InternVLReference(Reference):
    """transformers' model."""

    def __init__(self, model: Any, pictures: Any) -> None:
        self.model, self.pictures = model.float().eval(), pictures

    @torch.inference_mode()
    def features(self, media: Sequence[Media]) -> Array:
        pixels = torch.cat([torch.from_numpy(self.pictures(item)) for item in media])
        features: Array = self.model.model.get_image_features(pixel_values=pixels).pooler_output.flatten(0, 1).numpy()
        return features

    @torch.inference_mode()
    def logits(self, prompt: Prompt, media: Sequence[Media], answer: Sequence[int]) -> Array:
        ids = torch.from_numpy(prompt.token_ids)
        embeddings = self.model.get_input_embeddings()(torch.cat([ids, torch.tensor(list(answer), dtype=torch.long)]))
        if media:
            pads = torch.nonzero(ids == self.model.config.image_token_id)[:, 0]
            embeddings[pads] = torch.from_numpy(self.features(media))
        logits: Array = self.model(inputs_embeds=embeddings[None]).logits[0].numpy()
        return logits


class InternVLCase(FamilyCase):
    """What both formats share."""

    @abstractmethod
    def pictures(self, media: Media) -> Array:
        """Tiles [N, 3, S, S]."""

    @abstractmethod
    def text_ids(self, folder: Path, text: str) -> list[int]:
        """Ids of a whole prompt, by the checkpoint's own tokenizer."""

    system = ""
    frame_label, image_label = "Frame-{}: ", "Image-{}: "  # the authors' README since InternVL 2.5

    def pixels(self, folder: Path, media: Media) -> list[Array]:
        pictures = self.pictures(media)
        side = TILE // PATCH
        cut = [
            pictures[:, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].reshape(len(pictures), -1)
            for y in range(side)
            for x in range(side)
        ]
        return [np.stack(cut, axis=1)]

    def prompt_ids(self, folder: Path, turns: Sequence[Turn], media: Sequence[Media]) -> list[int]:
        rest, text = list(media), self.system
        images, shown = sum(not isinstance(item, Video) for item in media), 0
        for turn in turns:
            text += f"<|im_start|>{turn.role}\n"
            for part in turn.parts:
                if isinstance(part, str):
                    text += part
                    continue
                tiles = len(self.pictures(rest.pop(0)))
                if part is Visual.VIDEO:
                    frames = [self.frame_label.format(i + 1) for i in range(tiles)]
                else:
                    shown += 1
                    frames = [self.image_label.format(shown) if images > 1 else ""]
                rows = ROWS if part is Visual.VIDEO else ROWS * tiles
                text += "".join(f"{name}<img>{'<IMG_CONTEXT>' * rows}</img>\n" for name in frames)
            text += "<|im_end|>\n"
        return self.text_ids(folder, text + "<|im_start|>assistant\n")

    def labels(self, folder: Path, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        """families.md 6.4: the place in the frame; what is written between frames is text."""
        (pad,) = self.text_ids(folder, "<IMG_CONTEXT>")[-1:]
        expected: list[int] = []
        for item in media:
            first, tiles = max(expected, default=-1) + 1, len(self.pictures(item))
            places = [*range(ROWS)] * tiles if isinstance(item, Video) else range(ROWS * tiles)
            expected += [first + place for place in places]
        return [expected.pop(0) if index == pad else -1 for index in ids]


class ChatCase(InternVLCase):
    """The authors' format over Qwen2.5."""

    family = "internvl_chat"
    llm = "qwen2"
    variants: ClassVar[tuple[str, ...]] = ("small", "large-sharded-bfloat16", "wide-select-float16", "vocabulary-files")
    system = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"

    def write(self, folder: Path, variant: str) -> None:
        write_chat(folder, variant, self.llm)

    def reference(self, folder: Path) -> Reference:
        return InternVLReference(from_chat(folder, self.text_ids(folder, "<IMG_CONTEXT>")[-1]), self.pictures)

    def pictures(self, media: Media) -> Array:
        return chat_pictures(media)

    def text_ids(self, folder: Path, text: str) -> list[int]:
        return list(hub_tokenizer(folder)(text).input_ids)

    def indices(self, total_frames: int, fps: float) -> list[int]:
        """The authors' example for videos: 32 segments, and a frame near the middle of each."""
        length = (total_frames - 1) / 32
        return [int(length / 2 + round(length * i)) for i in range(32)]


@cache
def hub_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; Qwen2's class where there are only vocabulary files."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    path = folder / "tokenizer.json"
    if path.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(path))  # type: ignore[no-untyped-call]
    return Qwen2Tokenizer.from_pretrained(folder)


class InternLM2Case(ChatCase):
    """The authors' format over InternLM2, whose tokenizer is SentencePiece's."""

    family = "internvl_chat_internlm2"
    llm = "internlm2"
    variants: ClassVar[tuple[str, ...]] = ("small", "large-sharded-bfloat16", "wide-float16")

    def text_ids(self, folder: Path, text: str) -> list[int]:
        """As the slow class has it: a begin, and SentencePiece for what stands between control tokens."""
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        control = json.loads((folder / "added_tokens.json").read_text())
        ids = [pieces.bos_id()]
        for part in re.split(f"({'|'.join(map(re.escape, control))})", text):
            ids += [control[part]] if part in control else pieces.encode(part)
        return ids


class NativeCase(InternVLCase):
    """transformers' own format."""

    family = "internvl"
    frame_label, image_label = "Frame{}: ", ""  # transformers' processor
    variants = ("qwen2", "tied-sharded-bfloat16", "llama-new-names-large-float16", "qwen3-wide-select-processor")

    def write(self, folder: Path, variant: str) -> None:
        write_native(folder, variant)

    def reference(self, folder: Path) -> Reference:
        from transformers import InternVLForConditionalGeneration

        model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return InternVLReference(model, self.pictures)

    def pictures(self, media: Media) -> Array:
        return native_pictures(media)

    def text_ids(self, folder: Path, text: str) -> list[int]:
        return list(hub_tokenizer(folder)(text).input_ids)

    def indices(self, total_frames: int, fps: float) -> list[int]:
        """`sample_frames` of transformers' video processor."""
        part = total_frames / NATIVE_FRAMES
        indices: list[int] = torch.arange(part / 2, total_frames, part).int().tolist()
        return indices


NATIVE_NAMES = (
    (r"vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (r"vision_model\.embeddings\.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    (r"vision_model\.encoder\.layers", "model.vision_tower.encoder.layer"),
    (r"\.attn\.proj", ".attention.projection_layer"),
    (r"\.attn\.([qk]_norm)", r".attention.\1"),
    (r"\.norm1", ".layernorm_before"),
    (r"\.norm2", ".layernorm_after"),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"mlp1\.0", "model.multi_modal_projector.layer_norm"),
    (r"mlp1\.1", "model.multi_modal_projector.linear_1"),
    (r"mlp1\.3", "model.multi_modal_projector.linear_2"),
    (r"language_model\.(output|lm_head)", "lm_head"),
    (r"language_model\.model\.tok_embeddings", "language_model.model.embed_tokens"),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1", ".mlp.gate_proj"),
    (r"\.feed_forward\.w2", ".mlp.down_proj"),
    (r"\.feed_forward\.w3", ".mlp.up_proj"),
    (r"\.attention_norm", ".input_layernorm"),
    (r"\.ffn_norm", ".post_attention_layernorm"),
    (r"^language_model\.model\.", "model.language_model."),
)
"""The authors' names -> transformers'; what is packed there is taken apart by `unpacked`."""


def unpacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor by transformers' names, one head of keys after the other where the authors keep them together."""
    if ".attn.qkv." in name:
        parts = dict(zip("qkv", torch.chunk(tensor, 3), strict=True))
        return {name.replace("attn.qkv", f"attention.{part}_proj"): rows for part, rows in parts.items()}
    if ".attention.wqkv." not in name:
        return {name: tensor}
    found: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for group in torch.chunk(tensor, KV_HEADS):
        width = len(group) // 4  # two heads of queries, one of keys, one of values
        found["q"].append(group[: 2 * width])
        found["k"].append(group[2 * width : 3 * width])
        found["v"].append(group[3 * width :])
    return {name.replace("attention.wqkv", f"self_attn.{part}_proj"): torch.cat(rows) for part, rows in found.items()}


def from_chat(folder: Path, pad: int) -> Any:
    """transformers' model with the weights of a checkpoint in the authors' format."""
    from safetensors.torch import load_file
    from transformers import InternVLForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    text = dict(config["llm_config"]) | {"tie_word_embeddings": False}
    if text["model_type"] == "internlm2":
        text |= {"model_type": "llama", "attention_bias": text.pop("bias", False)}
    text["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": text.pop("rope_theta")}
    del text["rope_scaling"], text["architectures"]
    config = native_config(
        text, config["vision_config"], pad, tie_word_embeddings=False, vision_feature_layer=config["select_layer"]
    )
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            for key, part in unpacked(name, tensor.float()).items():
                for pattern, replacement in NATIVE_NAMES:
                    key = re.sub(pattern, replacement, key)
                state[key] = part
    model = InternVLForConditionalGeneration(config)
    model.load_state_dict(state, strict=True)
    return model
