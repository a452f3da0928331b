"""MiniCPM-V 2.6 at tiny sizes, composed of parts that nobody here wrote, and its prompts by the released formulas.

transformers' Idefics2VisionTransformer, a resampler on torch.nn.MultiheadAttention with the checkpoint's own key names,
and Qwen2ForCausalLM. Prompts are one string, tokenized at once with special tokens on, as the released processor does;
labels are what FrameFusion's reference writes between the bounds of the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Prompt, Turn, Visual
from tests.families.case import Array, FamilyCase, Media, Reference
from tests.families.llava_checkpoints import write_json, write_tensors, write_tokenizer

PATCH, SCALE, QUERIES, SIDE = 14, 84, 4, 70
HIDDEN, VISION = 256, 32  # a head of the resampler is 128 wide
LAYERS = 3  # of the vision tower, the last one included
FRAME_SLICES, IMAGE_SLICES = 2, 9
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>", "<ref>", "</ref>", "<slice>", "</slice>",
    "<image_id>", "</image_id>", "<unk>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Width, height, most slices -> patches of the overview, slices, patches of a slice (rows, columns): worked out with the
# released image processor's code at a scale_resolution of 84.
LAYOUTS = {
    (112, 84, 2): ((5, 7), (1, 2), (7, 5)),
    (70, 70, 2): ((6, 6), (0, 0), (0, 0)),
    (98, 70, 9): ((5, 7), (0, 0), (0, 0)),
    (70, 112, 2): ((8, 5), (2, 1), (5, 7)),
    (70, 112, 9): ((8, 5), (2, 1), (5, 7)),
    (112, 84, 1): ((5, 7), (0, 0), (0, 0)),
    (160, 120, 9): ((5, 7), (2, 2), (5, 7)),
}


class Resampler(nn.Module):
    """The released resampler's parameters under its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(QUERIES, HIDDEN))
        self.proj = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))
        self.kv_proj = nn.Linear(VISION, HIDDEN, bias=False)
        self.attn = nn.MultiheadAttention(HIDDEN, HIDDEN // 128)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(HIDDEN, eps=1e-6) for _ in range(3))

    def forward(self, hidden: Tensor, rows: int, columns: int) -> Tensor:
        """[P, E] -> [Q, D]."""
        kv = self.ln_kv(self.kv_proj(hidden))
        out, _ = self.attn(self.ln_q(self.query), kv + sincos(rows, columns), kv)
        normed: Tensor = self.ln_post(out)
        return normed @ self.proj


def sincos(rows: int, columns: int) -> Tensor:
    """[P, D]: columns in the first half of the channels, rows in the second, sines before cosines; angles in fp64."""
    frequency = 10000.0 ** -(torch.arange(HIDDEN // 4, dtype=torch.float64) / (HIDDEN // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    across, down = (axis.reshape(-1, 1) * frequency for axis in (column, row))
    return torch.cat((across.sin(), across.cos(), down.sin(), down.cos()), 1).float()


def modules(vision_layers: int, vocab: int, tied: bool = False) -> dict[str, nn.Module]:
    """The three parts by their prefix in the checkpoint."""
    from transformers import Idefics2VisionConfig, Qwen2Config, Qwen2ForCausalLM
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

    vision = Idefics2VisionConfig(
        hidden_size=VISION, intermediate_size=2 * VISION, num_hidden_layers=vision_layers, num_attention_heads=2,
        image_size=SIDE * PATCH, patch_size=PATCH,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )  # fmt: skip
    return {"llm.": Qwen2ForCausalLM(text), "vpm.": Idefics2VisionTransformer(vision), "resampler.": Resampler()}


def write_checkpoint(
    folder: Path,
    *,
    dtype: str = "float32",
    tied: bool = False,
    drop_last: bool = False,
    padding_rows: int = 4,
    shards: int = 1,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """A checkpoint as the released code saves it: flat config.json, three prefixes, one file or several.

    `changes` are made to a JSON file by its name; None takes a key out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = max(write_tokenizer(folder, SPECIALS).values()) + 1 + padding_rows
    torch.manual_seed(0)
    tensors = {}
    for prefix, module in modules(LAYERS - drop_last, vocab, tied).items():
        for name, parameter in module.named_parameters():
            noise = torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
            tensors[prefix + name] = noise + (parameter.ndim == 1 and name.endswith("weight"))  # norms: about 1
    write_tensors(folder, tensors, dtype, shards)
    files = configs(vocab, tied) | {"generation_config": {"do_sample": False}}
    files["tokenizer_config"] = {"chat_template": CHAT_TEMPLATE}
    for name, content in files.items():
        merged = content | dict((changes or {}).get(name, {}))
        write_json(folder, **{name: {key: value for key, value in merged.items() if value is not None}})
    return folder


def configs(vocab: int, tied: bool) -> dict[str, dict[str, Any]]:
    """config.json and preprocessor_config.json with the keys of the released files."""
    config = {
        "architectures": ["MiniCPMV"], "model_type": "minicpmv", "version": 2.6, "vocab_size": vocab,
        "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": tied, "query_num": QUERIES, "image_size": 448, "patch_size": PATCH, "slice_mode": True,
        "use_image_id": True,
        "slice_config": {"model_type": "minicpmv", "patch_size": PATCH, "max_slice_nums": IMAGE_SLICES},
        "vision_config": {
            "hidden_size": VISION, "image_size": SIDE * PATCH, "intermediate_size": 2 * VISION, "model_type": "siglip",
            "num_attention_heads": 2, "num_hidden_layers": LAYERS, "patch_size": PATCH,
        },
    }  # fmt: skip
    processor = {
        "im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>", "unk": "<unk>",
        "im_id_start": "<image_id>", "im_id_end": "</image_id>", "max_slice_nums": IMAGE_SLICES, "version": 2.6,
        "scale_resolution": SCALE, "patch_size": PATCH, "use_image_id": True, "image_feature_size": QUERIES,
        "slice_mode": True, "norm_mean": [0.5, 0.5, 0.5], "norm_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    return {"config": config, "preprocessor_config": processor}


def frames_of(media: Media) -> NDArray[np.uint8]:
    """[N, H, W, 3]; an image is one frame."""
    return media.frames if isinstance(media, Video) else media[None]


def layout(media: Media, frame_slices: int = FRAME_SLICES) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Patches of the overview, slices, patches of a slice: rows and columns."""
    height, width = frames_of(media).shape[1:3]
    return LAYOUTS[width, height, frame_slices if isinstance(media, Video) else IMAGE_SLICES]


def pictures(media: Media) -> list[list[Image.Image]]:
    """Of each frame: the overview, then the slices row by row."""
    overview, (rows, columns), (tall, wide) = layout(media)
    shown = []
    for frame in map(Image.fromarray, frames_of(media)):
        tiles = [frame.resize((overview[1] * PATCH, overview[0] * PATCH), Image.Resampling.BICUBIC)]
        if rows:
            w, h = wide * PATCH, tall * PATCH
            refined = frame.resize((columns * w, rows * h), Image.Resampling.BICUBIC)
            tiles += [refined.crop((c * w, r * h, c * w + w, r * h + h)) for r in range(rows) for c in range(columns)]
        shown.append(tiles)
    return shown


def normalised(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in -1 .. 1."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    return (pixels - 0.5) / 0.5


def patches(tiles: Sequence[Image.Image]) -> Array:
    """[N, P, 588] as torch cuts them: a picture's patches in raster order, within each channel, row, column."""
    cut: Array = nn.functional.unfold(torch.cat([normalised(tile) for tile in tiles]), PATCH, stride=PATCH).mT.numpy()
    return cut


class MiniCpmVReference(Reference):
    """A checkpoint of `write_checkpoint`, run by parts that nobody here wrote, in fp32."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        tensors: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
        config = json.loads((folder / "config.json").read_text())
        stored = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("vpm.encoder.layers."))
        parts = modules(stored, config["vocab_size"], config["tie_word_embeddings"])
        for prefix, module in parts.items():
            part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if config["tie_word_embeddings"] and prefix == "llm.":
                part["lm_head.weight"] = part["model.embed_tokens.weight"]
            module.load_state_dict(part)  # strict: every key of the checkpoint is one of these parts' own
            module.float().eval()
        self.llm: Any = parts["llm."]
        self.vpm, self.resampler = parts["vpm."], parts["resampler."]
        self.unknown = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<unk>")

    @torch.inference_mode()
    def features(self, media: Sequence[Media]) -> Array:
        rows = []
        for picture in (picture for item in media for tiles in pictures(item) for picture in tiles):
            hidden = self.vpm(normalised(picture)).last_hidden_state[0]
            rows.append(self.resampler(hidden, picture.height // PATCH, picture.width // PATCH))
        return torch.cat(rows).numpy()

    @torch.inference_mode()
    def logits(self, prompt: Prompt, media: Sequence[Media], answer: Sequence[int]) -> Array:
        ids = torch.tensor([*prompt.token_ids.tolist(), *answer])
        embeddings = self.llm.model.embed_tokens(ids)
        if media:
            embeddings[ids == self.unknown] = torch.from_numpy(self.features(media))
        logits: Array = self.llm(inputs_embeds=embeddings[None]).logits[0].numpy()
        return logits


class MiniCpmVCase(FamilyCase):
    """The released layout; heads, types, files and the vocabulary vary."""

    family = "minicpmv"
    variants = ("float32", "bfloat16-sharded", "float16-tied", "without-last-layer", "vocabulary-of-512")

    def write(self, folder: Path, variant: str) -> None:
        write_checkpoint(
            folder,
            dtype=next((name for name in ("bfloat16", "float16") if name in variant), "float32"),
            tied="tied" in variant,
            drop_last="without" in variant,
            padding_rows=200 if "vocabulary" in variant else 0,
            shards=3 if "sharded" in variant else 1,
        )

    def reference(self, folder: Path) -> Reference:
        return MiniCpmVReference(folder)

    def pixels(self, folder: Path, media: Media) -> list[Array]:
        shown = pictures(media)
        groups = [[tiles[0] for tiles in shown], [slice_ for tiles in shown for slice_ in tiles[1:]]]
        return [patches(group) for group in groups if group]

    def prompt_ids(self, folder: Path, turns: Sequence[Turn], media: Sequence[Media]) -> list[int]:
        """The released chat(): parts of a turn joined by line feeds, the checkpoint's chat template, one string."""
        from transformers import PreTrainedTokenizerFast

        rest, number, messages = list(media), 0, []
        for turn in turns:
            lines: list[str] = []
            for part in turn.parts:
                if part is Visual.VIDEO:
                    shown = rest.pop(0)
                    lines += [placeholder(shown)] * len(frames_of(shown))
                elif part is Visual.IMAGE:
                    lines.append(f"<image_id>{number}</image_id>" + placeholder(rest.pop(0)))
                    number += 1
                else:
                    lines.append(str(part))
            messages.append({"role": turn.role, "content": "\n".join(lines)})
        template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=template)  # type: ignore[no-untyped-call]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def labels(self, folder: Path, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        """families.md 4.4 for videos; where the reference fails (images, one frame), rows are places of their own."""
        from tokenizers import Tokenizer

        known = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id
        tokens = np.array(ids)
        starts = 1 + np.flatnonzero((tokens == known("<image>")) | (tokens == known("<slice>")))
        ends = np.flatnonzero((tokens == known("</image>")) | (tokens == known("</slice>")))
        bounds, labels = np.stack([starts, ends], 1), np.full(tokens.size, -1)
        for item in media:
            count, in_frame = len(frames_of(item)), 1 + layout(item)[1][0] * layout(item)[1][1]
            pairs, bounds = bounds[: count * in_frame], bounds[count * in_frame :]
            first = labels.max() + 1
            if count > 1:
                places = np.arange(pairs[-1, 1] + 2 - pairs[0, 0]) % (pairs[in_frame, 0] - pairs[0, 0])
                labels[pairs[0, 0] : pairs[-1, 1] + 2] = first + places
            else:
                shown = np.concatenate([np.arange(*bound) for bound in pairs])
                labels[shown] = first + np.arange(shown.size)
        return labels.tolist()

    def indices(self, total_frames: int, fps: float) -> list[int]:
        """The released example's encode_video."""
        indices = list(range(0, total_frames, round(fps)))
        if len(indices) <= 64:
            return indices
        gap = len(indices) / 64
        return [indices[int(i * gap + gap / 2)] for i in range(64)]


def placeholder(media: Media) -> str:
    """What stands for one frame."""
    (rows, columns), unknown = layout(media)[1], "<unk>" * QUERIES
    return f"<image>{unknown}</image>" + "\n".join([f"<slice>{unknown}</slice>" * columns] * rows)
