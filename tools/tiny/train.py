"""Train the tiny Qwen2-VL from scratch on drawn clips: `python -m tools.tiny.train`.

Two stages, both on fresh clips at every step. First the vision tower alone learns to tell, for each merged token,
which colours, shapes and motions are in its cell; then the whole model learns to answer, with that as a side task.
Several questions share one pass over a video (`tools.tiny.model.Layout`), with the loss on answer tokens only.

glibc gives freed memory back at once, and a CPU step then waits for page faults; this keeps it:
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 python -m tools.tiny.train`. On a shared machine one thread
(`--threads 1`) is faster than two: every operation waits for the slower thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tools.tiny import clips
from tools.tiny import model as tiny
from tools.tiny.checkpoint import save_checkpoint
from tools.tiny.muon import Muon
from tools.tiny.prompt import Prompts, build_tokenizer

EVEN = ("color", "color", "shape", "direction", "count", "order")
# Finding an object by its shape to tell its colour is what the decoder learns last; alone it stays at guessing.
BY_SHAPE = ("color", "color", "color", "color", "shape", "direction", "count", "order")
WARMUP = 50  # steps
SEED_SPACE = 10_000_000  # scenes' seeds of a run: from seed * SEED_SPACE on
BRANCH = 20  # tokens a question and its answer may take


@dataclass(frozen=True)
class Stage:
    """A stretch of training on answers. The rate falls along a cosine from `rate` to `final * rate`."""

    frames: int
    steps: int
    batch: int
    rate: float
    final: float
    kinds: tuple[str, ...] = EVEN  # the kinds of the questions asked about each clip
    least: int = 1  # objects in a clip


VISION_STEPS = 1900
VISION_BATCH = 8
VISION_RATE = 4e-3
STAGES = (
    Stage(16, 180, 16, 4e-3, 0.6),
    Stage(16, 330, 8, 4e-3, 0.5, BY_SHAPE, least=2),
    Stage(32, 600, 8, 3e-3, 0.01),
)


class Grids(Dataset[tuple[Tensor, Tensor]]):
    """For the first stage: some temporal grids of a scene, and what is in each of their cells."""

    def __init__(self, first_seed: int, count: int, per_scene: int = 8) -> None:
        self.first_seed = first_seed
        self.count = count
        self.per_scene = per_scene

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.first_seed + index, 9))
        scene = clips.make_scene(self.first_seed + index)
        # Mostly moments at which something is seen.
        busy = [g for g in range(16) if any(thing.visible_at(g + 0.25) for thing in scene.things)]
        chosen = rng.choice(busy if rng.random() < 0.9 else np.arange(16), self.per_scene)
        times = (chosen[:, None] + np.array([0.0, 0.5])).ravel()
        frames = clips.degrade(clips.render(scene, times), rng)
        return torch.from_numpy(np.array(frames)), torch.from_numpy(clips.cell_labels(scene, times))


class Talks(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """For the second stage: a clip, its cells, and the token ids and targets of its questions."""

    def __init__(self, prompts: Prompts, first_seed: int, stage: Stage) -> None:
        self.prompts = prompts
        self.first_seed = first_seed
        self.stage = stage

    def __len__(self) -> int:
        return self.stage.steps * self.stage.batch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng((self.first_seed + index, 8))
        scene = clips.make_scene(self.first_seed + index, self.stage.frames / 2, self.stage.least)
        times = np.arange(self.stage.frames) / 2
        frames = clips.degrade(clips.render(scene, times), rng)
        ids, targets = np.full((2, len(self.stage.kinds), BRANCH), self.prompts.pad)
        targets[:] = -100
        for row, kind in enumerate(self.stage.kinds):
            question = clips.ask(scene, "color" if kind == "order" and len(scene.things) < 2 else kind, rng)
            question_ids = self.prompts.question(question.text)
            answer = self.prompts.answer(question.answer)
            ids[row, : len(question_ids) + len(answer)] = question_ids + answer
            targets[row, len(question_ids) - 1 : len(question_ids) + len(answer) - 1] = answer
        cells = torch.from_numpy(clips.cell_labels(scene, times))
        return torch.from_numpy(np.array(frames)), cells, torch.from_numpy(ids), torch.from_numpy(targets)


class Trainer:
    """The model, its optimizer and the log of one run."""

    def __init__(self, seed: int, out: Path) -> None:
        self.tokenizer = build_tokenizer()
        self.prompts = Prompts(self.tokenizer)
        self.model = tiny.new_model(self.tokenizer, seed)
        self.probe = nn.Linear(128, len(clips.CELL_FACTS))
        self.seed = seed
        self.out = out
        self.step = 0
        self.started = time.time()
        self.log: list[dict[str, Any]] = []

    def loader(self, data: Dataset[Any], batch: int) -> DataLoader[Any]:
        return DataLoader(data, batch_size=batch, num_workers=1, prefetch_factor=4, drop_last=True)

    def optimizers(self, steps: int, rate: float, final: float) -> list[tuple[torch.optim.Optimizer, Any]]:
        """Muon for the matrices inside the layers, AdamW for the rest, each with its schedule."""
        named = [*self.model.named_parameters(), *self.probe.named_parameters(prefix="probe")]
        inner = [p for n, p in named if p.ndim == 2 and "embed" not in n and "probe" not in n]
        known = set(map(id, inner))
        rest = [p for _, p in named if id(p) not in known]
        pair = [
            Muon(inner, lr=rate, weight_decay=0.02),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.97), weight_decay=0.0, fused=True),
        ]

        def schedule(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
            return min((step + 1) / WARMUP, final + (1 - final) * cosine)

        return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)) for optimizer in pair]

    def cell_loss(self, features: Tensor, cells: Tensor) -> Tensor:
        logits = self.probe(features)
        return F.binary_cross_entropy_with_logits(logits, cells.reshape(logits.shape).float()) * 10

    def train_vision(self, steps: int, batch: int, rate: float) -> None:
        optimizers = self.optimizers(steps, rate, 0.3)
        recent: deque[float] = deque(maxlen=50)
        for frames, cells in self.loader(Grids(self.seed * SEED_SPACE, steps * batch), batch):
            loss = self.cell_loss(tiny.vision_features(self.model, tiny.patch_batch(frames)), cells)
            self._descend(loss, optimizers)
            recent.append(float(loss.detach()))
            if self.step % 50 == 0:
                self._report(stage="vision", loss=float(np.mean(recent)))

    def train_answers(self, stage: Stage) -> None:
        optimizers = self.optimizers(stage.steps, stage.rate, stage.final)
        data = Talks(self.prompts, self.seed * SEED_SPACE + self.step * 1000, stage)
        layout = tiny.Layout(self.model, len(self.prompts.before), stage.frames // 2, len(stage.kinds), BRANCH)
        recent: deque[tuple[float, float]] = deque(maxlen=50)
        right: Counter[str] = Counter()
        for clip, cells, ids, targets in self.loader(data, stage.batch):
            features, logits = self._answer(clip, ids, targets, layout)
            wanted = targets[targets >= 0]
            answer_loss = F.cross_entropy(logits, wanted)
            cell_loss = self.cell_loss(features, cells)
            self._descend(answer_loss + cell_loss, optimizers)
            recent.append((float(answer_loss.detach()), float(cell_loss.detach())))
            right += _right_by_kind(stage.kinds, logits.argmax(-1), targets)
            if self.step % 50 == 0:
                means = np.mean(recent, 0)
                times = {kind: 50 * stage.batch * stage.kinds.count(kind) for kind in clips.KINDS}
                share = {kind: round(right[kind] / times[kind], 3) for kind in clips.KINDS}
                self._report(stage=f"answers{stage.frames}", loss=float(means[0]), cells=float(means[1]), right=share)
                right.clear()
            if self.step % 200 == 0:
                save_checkpoint(self.model, self.tokenizer, self.out)

    def _answer(self, clip: Tensor, ids: Tensor, targets: Tensor, layout: tiny.Layout) -> tuple[Tensor, Tensor]:
        """Vision features and the logits at the target positions."""
        embed = self.model.model.language_model.embed_tokens
        features = tiny.vision_features(self.model, tiny.patch_batch(clip))
        video = features.reshape(len(clip), -1, features.shape[-1])
        before = embed(torch.tensor(self.prompts.before)).expand(len(clip), -1, -1)
        x = torch.cat([before, video, embed(ids.flatten(1))], dim=1)
        hidden = tiny.answer_hidden(self.model, x, layout)
        return features, F.linear(hidden[targets.flatten(1) >= 0], embed.weight)

    def _descend(self, loss: Tensor, optimizers: list[tuple[torch.optim.Optimizer, Any]]) -> None:
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
        self.step += 1

    def _report(self, **facts: Any) -> None:
        line = {"step": self.step, "seconds": round(time.time() - self.started, 1), **facts}
        self.log.append(line)
        print(json.dumps(line), flush=True)


def _right_by_kind(kinds: tuple[str, ...], predicted: Tensor, targets: Tensor) -> Counter[str]:
    """How many questions of each kind have every answer token right; `predicted` holds the target tokens, [n]."""
    wrong = torch.zeros_like(targets)
    wrong[targets >= 0] = (predicted != targets[targets >= 0]).long()
    right = (wrong.sum(-1) == 0).sum(0)
    tally: Counter[str] = Counter()
    for kind, number in zip(kinds, right.tolist(), strict=True):
        tally[kind] += number
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/models/tiny_qwen2_vl"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.seed, args.out)
    save_checkpoint(trainer.model, trainer.tokenizer, args.out)
    trainer.train_vision(round(VISION_STEPS * args.scale), VISION_BATCH, VISION_RATE)
    for stage in STAGES:
        trainer.train_answers(replace(stage, steps=round(stage.steps * args.scale)))
    save_checkpoint(trainer.model, trainer.tokenizer, args.out)
    facts = {"seed": args.seed, "steps": trainer.step, "seconds": trainer.log[-1]["seconds"], "log": trainer.log[3::4]}
    (args.out / "TRAINING.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
