"""NVILA at tiny sizes, composed of parts that nobody here wrote, and its prompts as VILA's processor makes them.

transformers' SiglipVisionModel, torch's unfold, LayerNorm, Linear and mean, and Qwen2ForCausalLM. A prompt is one
string with a media token for each picture or video, tokenized at once; each of these then becomes rows and line feeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Prompt, Turn
from tests.families.case import Array, FamilyCase, Media, Reference
from tests.families.llava_checkpoints import HIDDEN, randomize, text_config, write_json, write_tensors, write_tokenizer

SIZE, PATCH, SIDE, WIDTH = 70, 14, 5, 24  # 5 x 5 patches: no whole number of blocks
MEDIA = ("<image>", "<vila/video>")
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]")
LATER = ("<vila/sentinel>", *MEDIA)  # VILA adds them when it loads a model: no row of the table is theirs
FRAMES = 12
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TSP = "llava.model.encoders.TSPVideoEncoder"
BLOCKS = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
# variant: what config.json says, and how the files lie
CONFIGS: dict[str, dict[str, Any]] = {
    "pooled": {
        "mm_projector_type": "mlp_downsample_2x2_fix", "video_encoder": {"_target_": TSP, "pool_sizes": [[2, 1, 1]]},
    },
    "lite": {"mm_projector_type": "mlp_downsample_3x3_fix", "image_aspect_ratio": "dynamic"},
    "s2": {
        "mm_projector_type": "mlp_downsample", "dynamic_s2": True, "s2_scales": "70,140,210",
        "s2_resize_output_to_scale_idx": -1, "image_aspect_ratio": "dynamic_s2",
        "video_encoder": '{"_target_": "llava.model.encoders.BasicVideoEncoder"}',
    },
    "s2_video": {
        "mm_projector_type": "mlp_downsample_2x2_fix", "dynamic_s2": True, "s2_scales": "70,140,210",
        "video_encoder": {"_target_": TSP, "pool_sizes": [[4, 1, 1]]},
    },
    "blocks": {
        "mm_projector_type": "mlp_downsample_3x3_fix",
        "video_encoder": json.dumps({"_target_": TSP, "pool_sizes": [[4, 2, 1]]}),
    },
    "single_file": {
        "mm_projector_type": "mlp_downsample_2x2_fix", "video_encoder": "llava.model.encoders.BasicVideoEncoder",
        "architectures": ["VILAForCausalLM"], "model_type": "vila",
    },
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "lite": {"dtype": "bfloat16", "shards": 3, "tied": True},
    "s2": {"dtype": "float16", "infix": ""},
    "single_file": {"single": True, "tied": True, "extra_rows": 9},
}


class NvilaCase(FamilyCase):
    """Sub-folders and one file, both projectors, frames pooled or not, one scale or three."""

    family: ClassVar[str] = "nvila"
    variants: ClassVar[tuple[str, ...]] = tuple(CONFIGS)
    thorough: ClassVar[tuple[str, ...]] = ("lite", "s2")  # a single image has tiles

    def write(self, folder: Path, variant: str) -> None:
        write_checkpoint(folder, CONFIGS[variant], **FILES.get(variant, {}))

    def reference(self, folder: Path) -> Reference:
        return NvilaReference(folder)

    def pixels(self, folder: Path, media: Media) -> list[Array]:
        config, is_video = read_config(folder), isinstance(media, Video)
        pictures = [Image.fromarray(frame) for frame in (media.frames if isinstance(media, Video) else media[None])]
        patches = nn.functional.unfold(processed(folder, pictures), PATCH, stride=PATCH).transpose(1, 2)
        groups = len(pictures) // (pool_sizes(config)[0] if is_video else 1)
        return [patches.reshape(groups, -1, patches.shape[2]).numpy()]

    def prompt_ids(self, folder: Path, turns: Sequence[Turn], media: Sequence[Media]) -> list[int]:
        tokenizer, config = load_tokenizer(folder), read_config(folder)
        waiting, said = iter(pictures_of(config, media)), []
        for turn in turns:
            parts = [part if isinstance(part, str) else next(waiting).text for part in turn.parts]
            said.append({"role": turn.role, "content": "".join(parts).strip()})
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        image, video = tokenizer.convert_tokens_to_ids(list(MEDIA))
        (line_feed,) = tokenizer("\n").input_ids
        shown = pictures_of(config, media)
        images = iter([item for item in shown if MEDIA[0] in item.text for _ in range(item.times)])
        videos = iter([item for item in shown if MEDIA[1] in item.text])
        ids: list[int] = []
        for token in tokenizer(text).input_ids:
            if token == video:
                rows, times, _ = next(videos)
                ids += [*[-1] * rows, line_feed] * times
            else:
                ids += [*[-1] * next(images).rows, line_feed] if token == image else [token]
        return ids

    def labels(self, folder: Path, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        """A video's rows count within the frame, its line feed is the place after them; an image's never repeat."""
        labels, at, first = [-1] * len(ids), 0, 0
        for item, (rows, times, _) in zip(media, pictures_of(read_config(folder), media), strict=True):
            for time in range(times):
                at = list(ids).index(-1, at)
                place = first if isinstance(item, Video) else first + time * (rows + 1)
                labels[at : at + rows + 1] = range(place, place + rows + 1)
                at += rows + 1
            first += (rows + 1) * (1 if isinstance(item, Video) else times)
        return labels

    def indices(self, total_frames: int, fps: float) -> list[int]:
        return np.round(np.linspace(0, total_frames - 1, FRAMES)).astype(int).tolist()  # type: ignore[no-any-return]


class NvilaReference(Reference):
    """A checkpoint of `write_checkpoint`, in fp32."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2Config

        self.config, self.folder = read_config(folder), folder
        tensors = dict(read_tensors(folder))
        self.parts = parts_of(self.config, Qwen2Config.from_dict(self.config["llm_cfg"]))
        for name, module in self.parts.items():
            state = {key: tensors.get(f"{name}.{key}") for key in module.state_dict()}
            if name == "llm" and state["lm_head.weight"] is None:
                state["lm_head.weight"] = state["model.embed_tokens.weight"]
            module.load_state_dict({key: tensor.float() for key, tensor in state.items() if tensor is not None})
            module.eval()

    @torch.inference_mode()
    def features(self, media: Sequence[Media]) -> Array:
        single = sum(not isinstance(item, Video) for item in media) == 1
        aspect = self.config["image_aspect_ratio"] if single else "resize"
        rows = [np.zeros((0, HIDDEN), np.float32)]
        for item in media:
            if isinstance(item, Video):
                projected = self.projected([Image.fromarray(frame) for frame in item.frames])
                for axis, size in enumerate(pool_sizes(self.config)):
                    shape = projected.shape
                    projected = projected.reshape(*shape[:axis], -1, size, *shape[axis + 1 :]).mean(axis + 1)
            elif aspect == "dynamic_s2":
                projected = self.scaled(item)
            else:
                projected = self.projected(cut(item) if aspect == "dynamic" else [Image.fromarray(item)])
            rows.append(projected.flatten(0, 2).numpy())
        return np.concatenate(rows)

    def projected(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, lines, columns, D]"""
        return self.joined(self.hidden(pictures).repeat(1, copies_of(self.config), 1, 1))

    def scaled(self, image: Array) -> Tensor:
        """[1, lines, columns, D]: chessboards of tiles at each scale, as large as the last, put side by side."""
        columns, rows = shape_of(image, 9)
        boards = [
            chessboard(self.hidden(tiles_of(image, *shape)), *shape) for shape in ((1, 1), (2, 2), (columns, rows))
        ]
        size = (rows * SIDE, columns * SIDE)
        together = torch.cat([nn.functional.interpolate(board, size=size, mode="area") for board in boards], 1)
        tiles = [tile for line in together.chunk(rows, 2) for tile in line.chunk(columns, 3)]
        joined = self.joined(torch.cat(tiles)).permute(0, 3, 1, 2)
        return chessboard(joined, columns, rows).permute(0, 2, 3, 1)

    def hidden(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, E, side, side]"""
        out = self.parts["vision_tower"](processed(self.folder, pictures), output_hidden_states=True)
        grid: Tensor = out.hidden_states[-2].transpose(1, 2).reshape(len(pictures), -1, SIDE, SIDE)
        return grid

    def joined(self, grid: Tensor) -> Tensor:
        """[n, C, side, side] -> [n, lines, columns, D]"""
        k, blocks = BLOCKS[self.config["mm_projector_type"]], blocks_of(self.config)
        padded = nn.functional.pad(grid, (0, blocks * k - SIDE, 0, blocks * k - SIDE))
        unfolded = nn.functional.unfold(padded, k, stride=k).reshape(len(grid), -1, k * k, blocks**2)
        out: Tensor = self.parts["mm_projector"](unfolded.permute(0, 3, 2, 1).flatten(2))
        return out.reshape(len(grid), blocks, blocks, -1)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, media: Sequence[Media], answer: Sequence[int]) -> Array:
        llm: Any = self.parts["llm"]
        ids = torch.tensor([*prompt.token_ids.tolist(), *answer])
        embedded = llm.model.embed_tokens(ids.clamp(0))
        embedded[ids == -1] = torch.from_numpy(self.features(media))
        logits: Array = llm(inputs_embeds=embedded[None]).logits[0].numpy()
        return logits


class Projector(nn.Module):
    """VILA's projector behind its first layer, which joins blocks."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        wide, last = BLOCKS[kind] ** 2 * width, nn.Linear(HIDDEN, HIDDEN)
        layers: list[nn.Module] = [nn.Identity(), nn.LayerNorm(wide)]
        if BLOCKS[kind] == 2:
            layers += [nn.Linear(wide, HIDDEN), nn.GELU(), last]
        else:
            narrow = 3 * width
            layers += [nn.Linear(wide, narrow), nn.GELU(), nn.LayerNorm(narrow)]
            layers += [nn.Linear(narrow, HIDDEN), nn.GELU(), last]
        self.layers = nn.Sequential(*layers)

    def forward(self, joined: Tensor) -> Tensor:
        """[n, L, k*k*C] -> [n, L, D]"""
        out: Tensor = self.layers(joined)
        return out


def parts_of(config: Mapping[str, Any], llm_config: Any) -> dict[str, nn.Module]:
    """The model with random weights."""
    from transformers import Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    return {
        "llm": Qwen2ForCausalLM(llm_config),
        "vision_tower": SiglipVisionModel(SiglipVisionConfig.from_dict(config["vision_tower_cfg"])),
        "mm_projector": Projector(config["mm_projector_type"], WIDTH * copies_of(config)),
    }


def write_checkpoint(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    dtype: str = "float32",
    tied: bool = False,
    shards: int = 1,
    single: bool = False,
    infix: str = "vision_model.",
    extra_rows: int = 0,
) -> None:
    """As VILA's `save_pretrained` leaves it, or all in one file.

    Args:
        folder: empty.
        told: what config.json says beside what all say.
        dtype: of the tensors.
        tied: no projection to the vocabulary of its own.
        shards: files of the LLM.
        single: one file for all parts.
        infix: in the names of the vision tower; newer releases of transformers have none.
        extra_rows: of the table, beyond the tokens that the file has.
    """
    from transformers import Qwen2Config

    llm = folder if single else folder / "llm"
    llm.mkdir(exist_ok=True)
    ids = write_tokenizer(llm, (*CONTROLS, *LATER))
    rows = ids["<vila/sentinel>"] + extra_rows
    config: dict[str, Any] = {
        "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama", "image_aspect_ratio": "resize",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch", "num_video_frames": FRAMES, "fps": 0.0,
        "dynamic_s2": False, "s2": False, "num_time_tokens": 0, "time_token_format": "<t{t}>", "chat_template": None,
        "vision_tower_cfg": {
            "model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"], "hidden_size": WIDTH,
            "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE,
            "patch_size": PATCH, "vision_use_head": False, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        },
        "llm_cfg": text_config("qwen2", ids, tied) | {"architectures": ["Qwen2ForCausalLM"], "vocab_size": rows},
        "mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": settings["mm_projector_type"]},
        **settings,
    }  # fmt: skip
    parts = parts_of(config, Qwen2Config.from_dict(config["llm_cfg"]))
    tensors = {name: dict(randomize(part, seed).named_parameters()) for seed, (name, part) in enumerate(parts.items())}
    tensors["vision_tower"] = {infix + key: tensor for key, tensor in tensors["vision_tower"].items()}
    processor = {
        "size": {"height": SIZE, "width": SIZE}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    }  # fmt: skip
    del config["mm_projector_type"]  # VILA writes it into the projector's own part alone
    write_json(llm, tokenizer_config={"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
    write_json(llm, generation_config={"eos_token_id": ids["<|im_end|>"]})
    if single:
        names = {"llm": "llm.", "vision_tower": "vision_tower.vision_tower.", "mm_projector": "mm_projector."}
        stored = {
            names[part] + key: tensor for part, part_tensors in tensors.items() for key, tensor in part_tensors.items()
        }
        write_tensors(folder, stored, dtype, shards)
        write_json(folder, preprocessor_config=processor)
    else:
        for part, part_tensors in tensors.items():
            (folder / part).mkdir(exist_ok=True)
            write_tensors(folder / part, part_tensors, dtype, shards if part == "llm" else 1)
            write_json(folder / part, config=config[f"{part}_cfg"])
        write_json(folder / "vision_tower", preprocessor_config=processor)
    write_json(folder, config=config)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the type of the projector where it is easy to find."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {**config, **config["mm_projector_cfg"]}


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors by part and by transformers' own names."""
    from safetensors.torch import load_file

    for path in folder.rglob("*.safetensors"):
        for key, tensor in load_file(path).items():
            name = key if path.parent == folder else f"{path.parent.name}.{key}"
            yield name.replace("vision_tower.vision_tower.", "vision_tower.").replace(".vision_model.", "."), tensor


def load_tokenizer(folder: Path) -> Any:
    """transformers' own, which knows the media tokens as special ones."""
    from transformers import PreTrainedTokenizerFast

    path = next(folder.rglob("tokenizer.json"))
    template = json.loads((path.parent / "tokenizer_config.json").read_text())["chat_template"]
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_file=str(path), chat_template=template)


def processed(folder: Path, pictures: Sequence[Image.Image]) -> Tensor:
    """[n, 3, size, size] by the checkpoint's image processor."""
    from transformers import SiglipImageProcessorPil

    path = next(folder.rglob("preprocessor_config.json"))
    processor = SiglipImageProcessorPil.from_pretrained(path.parent)
    values: Tensor = processor(list(pictures), return_tensors="pt")["pixel_values"]
    return values


def cut(image: Array) -> list[Image.Image]:
    """Tiles of an image as VILA's dynamic resolution cuts it, of up to 12, and the image itself."""
    columns, rows = shape_of(image, 1)
    small = [Image.fromarray(image).resize((SIZE, SIZE))]
    return tiles_of(image, columns, rows) + small * (columns * rows > 1)


def shape_of(image: Array, fewest: int) -> tuple[int, int]:
    """Columns and rows of tiles by VILA's search, of `fewest` to 12 tiles."""
    height, width = image.shape[:2]
    shapes = {(i, j) for i in range(1, 13) for j in range(1, 13) if fewest <= i * j <= 12}
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        distance = abs(width / height - columns / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * SIZE * SIZE * columns * rows):
            best, nearest = (columns, rows), distance
    return best


def tiles_of(image: Array, columns: int, rows: int) -> list[Image.Image]:
    """Tiles line by line."""
    large = Image.fromarray(image).resize((columns * SIZE, rows * SIZE))
    boxes = [(c * SIZE, r * SIZE, (c + 1) * SIZE, (r + 1) * SIZE) for r in range(rows) for c in range(columns)]
    return [large.crop(box) for box in boxes]


def chessboard(tiles: Tensor, columns: int, rows: int) -> Tensor:
    """[rows * columns, C, h, w] -> [1, C, rows * h, columns * w]"""
    assert len(tiles) == rows * columns
    return torch.cat([torch.cat(list(line), 2)[None] for line in tiles.chunk(rows)], 2)


class Pictures(NamedTuple):
    """What a prompt shows of a video or an image."""

    rows: int  # of each
    times: int
    text: str  # VILA's media tokens


def pictures_of(config: Mapping[str, Any], media: Sequence[Media]) -> list[Pictures]:
    """For each video and image of a conversation."""
    frames, tall, wide = pool_sizes(config)
    rows, images = blocks_of(config) ** 2, [item for item in media if not isinstance(item, Video)]
    shown = []
    for item in media:
        if isinstance(item, Video):
            shown.append(Pictures(rows // (tall * wide), len(item.frames) // frames, MEDIA[1]))
        elif len(images) == 1 and config["image_aspect_ratio"] == "dynamic":
            shown.append(Pictures(rows, len(cut(item)), f"{MEDIA[0]}\n" * len(cut(item))))
        elif len(images) == 1 and config["image_aspect_ratio"] == "dynamic_s2":
            columns, lines = shape_of(item, 9)
            shown.append(Pictures(rows * columns * lines, 1, MEDIA[0]))
        else:
            shown.append(Pictures(rows, 1, MEDIA[0]))
    return shown


def pool_sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Frames, lines and columns to one."""
    encoder = config.get("video_encoder") or {}
    if isinstance(encoder, str):
        encoder = json.loads(encoder) if encoder.startswith("{") else {}
    return tuple(encoder.get("pool_sizes", [[1, 1, 1]])[0])


def blocks_of(config: Mapping[str, Any]) -> int:
    """Blocks along a side."""
    return -(-SIDE // BLOCKS[config["mm_projector_type"]])


def copies_of(config: Mapping[str, Any]) -> int:
    """Of the features, side by side."""
    return len(config["s2_scales"].split(",")) if config["dynamic_s2"] else 1
