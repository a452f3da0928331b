"""A live model of transformers that answers the questions of an evaluation: its own processor and chat template.

Frames are read and sampled as everywhere in this package and given to the processor as they are; everything behind
that is transformers', reduced by `apply_framefusion`. Positions of M-RoPE are transformers', too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from framefusion.errors import BackendError, CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.evaluate.answering import (
    TRANSFORMERS,
    Answer,
    Answerer,
    Condition,
    Setup,
    engine_of,
    outcomes_of,
)
from framefusion.export.evaluate.questions import Question
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.plan.stored_weights import eager_options
from framefusion.interface import apply_framefusion, remove_framefusion
from framefusion.runtime.media.sources import as_image, as_video
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Visual

ENCODERS = ("get_video_features", "get_image_features")


class TransformersAnswerer(Answerer):
    """transformers' own model, in fp32, with its processor.

    Raises:
        BackendError: transformers has no processor for the checkpoint, or a package that it wants is missing.
    """

    def __init__(self, checkpoint: Checkpoint, setup: Setup) -> None:
        self.setup = setup
        self.engine = engine_of(TRANSFORMERS)
        self.processor = load_processor(checkpoint.folder)
        self.sampling = setup.sampling(BuildPlan(checkpoint, eager_options(checkpoint)).sampling)
        self.model = load_model(checkpoint.folder)

    def answers(self, question: Question, conditions: Sequence[Condition]) -> Iterator[Answer]:
        """See `Answerer.answers`."""
        inputs = self.inputs(question)
        settings = {"seed": self.setup.seed_of(question)}
        length = inputs["input_ids"].shape[1]
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with encoded_once(self.model.base_model), torch.inference_mode():
            try:
                for condition in conditions:
                    apply_framefusion(self.model, condition.cost, reducer=condition.reducer, **settings)
                for condition in conditions:
                    handle = apply_framefusion(self.model, condition.cost, reducer=condition.reducer, **settings)
                    ids = self.model.generate(**inputs, max_new_tokens=self.setup.max_new_tokens, **greedy)
                    (record,) = handle.last
                    text = self.processor.decode(ids[0, length:], skip_special_tokens=True)  # [1, S + new]
                    left = record.visual_after
                    outcomes = outcomes_of(record.calls)
                    yield Answer(text, record.cost, record.visual_before, left, outcomes)
            finally:
                remove_framefusion(self.model)

    def inputs(self, question: Question) -> Mapping[str, Any]:
        """What transformers' processor makes of a question: token ids [1, S], pixels, and other inputs."""
        content: list[dict[str, str]] = []
        videos = list[Video]()
        images = list[Any]()
        turns = question.turns(self.setup.system)
        files = iter(question.files)
        for part in turns[-1].parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            content.append({"type": part.value})
            if part is Visual.VIDEO:
                videos.append(as_video(next(files), self.sampling))
            else:
                images.append(as_image(next(files)))
        earlier = [{"role": turn.role, "content": [{"type": "text", "text": turn.parts[0]}]} for turn in turns[:-1]]
        conversation = [*earlier, {"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        media: dict[str, Any] = {"images": images} if images else {}
        if videos:
            media |= {"videos": [video.frames for video in videos], "do_sample_frames": False}
            media["video_metadata"] = [_metadata(video) for video in videos]
        inputs: Mapping[str, Any] = self.processor(text=[prompt], return_tensors="pt", **media)
        return inputs


def _metadata(video: Video) -> dict[str, Any]:
    """Where the frames stood in their film, in the keys of transformers' processors."""
    height, width = video.frames.shape[1:3]
    return {
        "total_num_frames": video.counted_frames,
        "fps": video.fps,
        "duration": video.duration,
        "frames_indices": video.counted_indices.tolist(),
        "height": height,
        "width": width,
    }


def load_processor(folder: Path) -> Any:
    """transformers' processor of a checkpoint, one with a chat template.

    Raises:
        BackendError: there is none, or a package that it wants is missing.
    """
    try:
        from transformers import AutoProcessor

        load: Any = AutoProcessor.from_pretrained
        processor = load(folder, trust_remote_code=False)  # nor asks at a terminal whether to
    except (ImportError, OSError, ValueError, AttributeError) as error:
        # Before 5.17 transformers asks a class that needs torchvision for its module, and finds None.
        cause = " ".join(str(error).split()).split(". ")[0]
        raise BackendError(f"transformers' processor of {folder} cannot be loaded: {cause}") from None
    if getattr(processor, "chat_template", None) is None or not hasattr(processor, "image_processor"):
        raise BackendError(f"transformers' processor of {folder} has no chat template or takes no pictures")
    return processor


def load_model(folder: Path) -> Any:
    """transformers' model of a checkpoint, in fp32.

    Raises:
        CheckpointError: transformers has no class for it.
        BackendError: its weights are quantized, and a package that reads them is missing.
    """
    from transformers import AutoModelForImageTextToText

    try:
        load: Any = AutoModelForImageTextToText.from_pretrained
        model = load(folder, dtype=torch.float32, trust_remote_code=False)
    except ImportError as error:
        cause = str(error).strip().splitlines()[0]
        raise BackendError(f"transformers cannot load {folder} ({cause})") from None
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"transformers has no model for {folder} ({cause}): evaluate it with --live eager"
        ) from None
    return model.eval()


@contextmanager
def encoded_once(model: Any) -> Iterator[None]:
    """Within the block, the vision tower runs once for each tensor of pixels.

    What it gave is handed out as shallow copies: generate() sets and splits their fields.
    """
    names = [name for name in ENCODERS if hasattr(model, name)]
    for name in names:
        setattr(model, name, remembering(getattr(model, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def remembering(encode: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, called once for the same tensors; its signature stays, as generate() picks arguments by it."""
    held: dict[Any, Any] = {}

    @wraps(encode)
    def remembered(*args: Any, **given: Any) -> Any:
        tensors = [value for value in (*args, *given.values()) if isinstance(value, torch.Tensor)]
        key = tuple((tensor.data_ptr(), tuple(tensor.shape)) for tensor in tensors)
        if key not in held:
            held[key] = encode(*args, **given)
        return copy.copy(held[key])

    return remembered
