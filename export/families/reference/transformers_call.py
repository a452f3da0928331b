"""One prompt through transformers' own classes: what the torch graphs of a build are compared with.

A class loads its checkpoint itself, by `from_pretrained`: which files count, the names of their tensors, the defaults
of config.json and what is tied are its own doing, so a reading of ours that differs shows. It maps the files instead of
reading them, and the layers are computed in fp32 one at a time (streaming.py): memory holds a layer, whatever the size
of the model. Where transformers has no class of a whole format, a family puts classes of its parts together and says
what stood for the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from framefusion.errors import CheckFailedError, FrameFusionError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.streaming import stream
from framefusion.export.checkpoints.tensors.weights import STORED
from framefusion.export.machine import page_out
from framefusion.reduction.tracks import TEXT
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.text.prompt import Prompt

Array = NDArray[np.float32]


@dataclass
class TransformersCall:
    """A prompt and an answer to it, and what the classes of transformers make of them.

    Attributes:
        checkpoint: a folder; its weights are not read through this object.
        prompt: the tokens, the answer's among them.
        visuals: what the prompt shows.
        states: [S, D] that enter each layer by this project's graph, S being the prompt's length without the answer.
        final: [D] that enters the last norm behind the prompt's last token.
        num_layers: the first layers of the LLM alone; None: all.
        keep: tokens at the end whose logits are wanted.
        doing: called with what runs now.
        types: of the tensors that count, as safetensors names them; none: of all.
        dequantizing: the checkpoint is quantized, and transformers' quantizer makes floats of it when it is loaded.
        errors: largest difference of each of `states` and of `final`, relative to transformers' largest magnitude.
        row_errors: the same of the rows that enter the first layer: those of text, and those of visuals.
        missing: parameters that a class did not get from the checkpoint; they are NaN.
        left: tensors that a class of the whole format did not take.
        names: of the classes that ran.
    """

    checkpoint: Checkpoint
    prompt: Prompt
    visuals: Sequence[VisualInput]
    states: Sequence[Array] = ()
    final: Array | None = None
    num_layers: int | None = None
    keep: int = 1
    doing: Callable[[str], object] = lambda _: None
    types: Collection[str] = ()
    dequantizing: bool = False
    errors: list[float] = field(default_factory=list)
    row_errors: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def model(self, name: str, **how: Any) -> Any:
        """A causal model by its class's name, with what its layers are given recorded; see `module`."""
        model = self.module(name, **how)
        decoder = model.get_decoder()
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(self._compare_states(index), with_kwargs=True)
        decoder.norm.register_forward_pre_hook(self._compare_final, with_kwargs=True)
        return model

    def module(
        self,
        name: Any,
        *,
        config: Any = None,
        prefix: str = "",
        inner: str = "",
        renamed: Mapping[str, str] = MappingProxyType({}),
        supplied: Callable[[str], Tensor | None] = lambda _: None,
    ) -> Any:
        """A model of transformers with the weights of the checkpoint, in fp32, its layers on the disk.

        Args:
            name: of a class of transformers, or the class.
            config: in place of the one that the class reads from the folder.
            prefix: of the keys that the class is to take, where it is a part of what is stored.
            inner: what its own names begin with instead.
            renamed: further parts of keys, as regular expressions, and what the class calls them.
            supplied: values of parameters that are not stored as the class has them, by name.

        Raises:
            CheckFailedError: the class cannot read the checkpoint; its message is in this one's.
        """
        import transformers

        model_class: Any = getattr(transformers, name) if isinstance(name, str) else name
        self.names.append(model_class.__name__)
        whole = config is None
        folder, prefix = self._place(prefix)
        mapping = ({f"^{re.escape(prefix)}": inner} if prefix != inner else {}) | dict(renamed)
        with self._refused(model_class.__name__, "read"), _quiet():
            if config is None:
                config = model_class.config_class.from_pretrained(folder, local_files_only=True)
                if self.dequantizing:
                    config.quantization_config["dequantize"] = True
            model, loading = model_class.from_pretrained(
                folder, config=self._shortened(config), dtype=self._stored(), attn_implementation="sdpa",
                local_files_only=True, output_loading_info=True, key_mapping=mapping or None,
            )  # fmt: skip
        if whole and self.num_layers is None:  # a part leaves the others', the first layers the last
            self.left += sorted(loading["unexpected_keys"])
        self._stream(model.eval(), set(loading["missing_keys"]), supplied)
        return model

    def run(self, logits: Callable[[TransformersCall], Array]) -> Array:
        """Logits [keep, V] by a family's function.

        Raises:
            CheckFailedError: a class cannot read or compute the checkpoint.
        """
        with self._refused(self.checkpoint.config.get("model_type", "the class"), "compute"):
            return logits(self)

    @contextmanager
    def _refused(self, name: str, doing: str) -> Iterator[None]:
        """Whatever a class raises at what it cannot read or compute is said as that."""
        import transformers

        try:
            yield
        except FrameFusionError:
            raise
        except Exception as error:
            raise CheckFailedError(
                f"{' and '.join(self.names) or name} of transformers {transformers.__version__} cannot {doing} "
                f"{self.checkpoint.folder} ({type(error).__name__}: {error}), so what this build makes of it cannot be "
                "compared: mend the checkpoint, install a transformers that reads it, or leave the comparison out "
                "with --no-check"
            ) from error

    def _stream(self, model: nn.Module, missing: set[str], supplied: Callable[[str], Tensor | None]) -> None:
        stored = dict(model.named_parameters(remove_duplicate=False))
        self.missing += sorted(name for name in missing if supplied(name) is None)

        def read(name: str) -> Tensor:
            found = stored[name].detach()
            if name not in missing:
                return found
            given = supplied(name)
            return torch.full_like(found, torch.nan) if given is None else given

        def forget(name: str) -> None:
            page_out(stored[name].data_ptr(), stored[name].nbytes)

        stream(model, read, forget)

    def _place(self, prefix: str) -> tuple[Path, str]:
        """The folder that a class reads, and the prefix of its keys there: parts may have folders of their own."""
        places = {path.parent for path in self.checkpoint.tensor_files}
        for part, folder in self.checkpoint.parts.items():
            if folder in places and prefix.startswith(f"{part}."):
                return folder, prefix.removeprefix(f"{part}.")
        return self.checkpoint.folder, prefix

    def _stored(self) -> torch.dtype:
        """The type of the tensors, so that nothing is converted when they are mapped; fp32 where they have several.

        A class takes one type for all of them, and a narrower one would round those that are wider.
        """
        types = set(self.types) or {self.checkpoint.dtype(key) for key in self.checkpoint.files}
        name = STORED.get(next(iter(types)), "float32") if len(types) == 1 else "float32"
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def _shortened(self, config: Any) -> Any:
        """The configuration of the first layers alone, where not all are built."""
        if self.num_layers is not None:
            text = config.get_text_config(decoder=True)
            if hasattr(text, "num_hidden_layers"):
                text.num_hidden_layers = self.num_layers
                kinds = getattr(text, "layer_types", None)
                if kinds is not None:
                    text.layer_types = list(kinds)[: self.num_layers]
        return config

    def _compare_states(self, layer: int) -> Any:
        def compare(_module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            self.doing(f"transformers, layer {layer} of {len(self.states)}")
            if layer >= len(self.states):
                return
            ours = self.states[layer]
            theirs: Array = _hidden(arguments, named)[0, : len(ours)].numpy()
            self.errors.append(relative_error(ours, theirs))
            if layer == 0:
                self._compare_rows(ours, theirs)

        return compare

    def _compare_rows(self, ours: Array, theirs: Array) -> None:
        shown = self.prompt.row_places
        text = np.delete(np.arange(len(ours)), shown)
        for what, places in (("rows of text", text), ("rows of visuals", shown)):
            if places.size:
                self.row_errors[what] = relative_error(ours[places], theirs[places])

    def _compare_final(self, _module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if self.final is not None:
            theirs: Array = _hidden(arguments, named)[0, len(self.states[0]) - 1].numpy()
            self.errors.append(relative_error(self.final, theirs))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and its report of keys from the output: what matters of them is recorded."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _hidden(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """What a layer is given: [1, S, D]."""
    hidden: Tensor = arguments[0] if arguments else named["hidden_states"]
    return hidden


def relative_error(ours: NDArray[Any], reference: NDArray[Any]) -> float:
    """Largest difference over the largest magnitude of the reference."""
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def answered(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """A prompt with an answer behind it, for running both at once."""
    count = len(tokens)
    end = prompt.token_ids.size + prompt.rope_delta
    return replace(
        prompt,
        token_ids=np.concatenate([prompt.token_ids, np.asarray(tokens, np.int64)]),
        labels=np.concatenate([prompt.labels, np.full(count, TEXT)]),
        positions=np.concatenate([prompt.positions, np.broadcast_to(end + np.arange(count), (3, count))], axis=1),
    )
