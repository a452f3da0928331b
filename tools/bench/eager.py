"""What ours is compared with: transformers with SDPA over the same weights, dense or with as few tokens as ours.

It is told how many tokens each layer keeps, and pays nothing for finding out which.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.runtime.text.positions import decode_positions
from tools.bench.setting import Film


class Eager:
    """The same weights in transformers: eager torch with SDPA, the head on the last token only, as ours."""

    def __init__(
        self,
        checkpoint: Path,
        film: Film,
        threads: int,
        clock: Callable[[], float] = time.perf_counter,
        new_tokens: int = 16,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        import torch
        from transformers import Qwen2VLForConditionalGeneration

        if device != "cpu" and not torch.cuda.is_available():
            raise SystemExit(f"eager torch {torch.__version__} sees no GPU to be compared on: install its CUDA build")
        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=kind)
        self._torch = torch
        self.model = model.eval().to(device)
        self._clock = clock
        self._new = new_tokens
        self._device = device
        self._hidden = torch.from_numpy(film.hidden)[None].to(device, kind)
        self._positions = torch.from_numpy(film.prompt.positions)[:, None].to(device)
        places = decode_positions(len(film.hidden), film.prompt.rope_delta, new_tokens)
        self._next = torch.from_numpy(places[:, None].copy()).to(device)
        self.logits = np.zeros(0, np.float32)

    def run(self, lengths: Sequence[int] | None = None) -> tuple[float, float]:
        """Seconds of a prefill, and of one decoded token.

        Args:
            lengths: tokens that enter the attention of each layer; None keeps all.
        """
        first = self._hidden.shape[1] if lengths is None else lengths[0]
        with self._torch.inference_mode(), self._shortened(lengths):
            start = self._now()
            past = self._forward(self._hidden[:, :first].clone(), self._positions[:, :, :first], None)
            prefill = self._now() - start
            decode = []
            for step in range(self._new - 1):
                row = self._hidden[:, step : step + 1].clone()
                place = self._next[:, :, step : step + 1]
                start = self._now()
                self._forward(row, place, past, keep=False)
                decode.append(self._now() - start)
        return prefill, statistics.median(decode)

    def run_watched(self) -> tuple[tuple[float, float], int]:
        """`run` with every token, and the most bytes that torch held on the GPU meanwhile; 0 on the CPU."""
        if self._device == "cpu":
            return self.run(), 0
        self._torch.cuda.reset_peak_memory_stats()
        return self.run(), int(self._torch.cuda.max_memory_allocated())

    def _now(self) -> float:
        if self._device != "cpu":
            self._torch.cuda.synchronize()
        return self._clock()

    @contextmanager
    def _shortened(self, lengths: Sequence[int] | None) -> Iterator[None]:
        """Within the block a prefill loses tokens after attentions, as ours does; which ones does not matter here."""
        layers = self.model.model.language_model.layers
        hooks = []
        if lengths is not None:
            for layer, length, following in zip(layers, lengths, lengths[1:], strict=False):
                if following < length:
                    norm = layer.post_attention_layernorm
                    hooks.append(norm.register_forward_pre_hook(_cut(length, following)))
            hooks += [layer.register_forward_pre_hook(_fit_tables, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _forward(self, hidden: Any, positions: Any, past: Any, keep: bool = True) -> Any:
        out = self.model.model.language_model(
            inputs_embeds=hidden, position_ids=positions, past_key_values=past, use_cache=True
        )
        logits = self.model.lm_head(out.last_hidden_state[:, -1])
        if keep:
            self.logits = logits[0].float().cpu().numpy()
        return out.past_key_values


def _cut(length: int, following: int) -> Callable[..., None]:
    """A hook that keeps the first tokens of a prefill, in place: what it is given is the layer's residual, too."""

    def cut(_: Any, arguments: tuple[Any, ...]) -> None:
        (hidden,) = arguments
        if hidden.shape[1] == length:
            hidden.set_(hidden[:, :following].clone())

    return cut


def _fit_tables(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A hook that gives a layer the rotary tables of as many tokens as it has."""
    hidden = arguments[0] if arguments else named["hidden_states"]
    cos, sin = named["position_embeddings"]
    size = hidden.shape[1]
    return arguments, named | {"position_embeddings": (cos[..., :size, :], sin[..., :size, :])}
