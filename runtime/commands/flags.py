"""The flags of a question, as click takes them: what is shown, what is asked, and how it is answered.

Shared by every command that answers. Builds the runtime's objects of them; runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from framefusion.console import messages as console
from framefusion.console.terminal import PATIENCE, activity
from framefusion.runtime.backends import table

if TYPE_CHECKING:
    from framefusion.runtime.format.manifest import Manifest
    from framefusion.runtime.media.frame_sampling import FrameSampling
    from framefusion.runtime.media.media_file import MediaLimits
    from framefusion.runtime.pipeline import Pipeline, Request
    from framefusion.runtime.text.prompt import Turn, Visual

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only since click 8.2

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
MOST_THREADS = max(4 * (os.cpu_count() or 1), 64)  # beyond, a machine is only busy with changing between them
BACKENDS = ("auto", *table.backend_names())
DEVICES = ("auto", *table.DEVICES)
THREADS = click.option(
    "--threads",
    type=click.IntRange(min=0, max=MOST_THREADS),
    default=0,
    help="Of one operator; default: the physical cores.",
)
BACKEND = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What runs the bundle; auto takes the best that it and this machine allow.",
)
DEVICE = click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where.")
NO_VERIFY = click.option("--no-verify", is_flag=True, help="Do not compare the files of the bundle with their hashes.")
TRUSTED_KEYS = click.option(
    "--trusted-keys",
    type=FILE,
    envvar="FRAMEFUSION_TRUSTED_KEYS",
    show_envvar=True,
    help="Refuse a bundle that none of the ed25519 keys of this file signed.",
)
TRUST_ENGINES = click.option(
    "--trust-engines",
    is_flag=True,
    help="Run the bundle's engines, which are code, though no trusted key signed it and they were not compiled here.",
)
NO_CHECK = click.option(
    "--no-check",
    is_flag=True,
    help="Do not prove a backend that this device has not run the bundle's golden with: see `ff-run check`.",
)
BACKEND_OPTIONS = (THREADS, BACKEND, DEVICE, NO_VERIFY, TRUSTED_KEYS, TRUST_ENGINES)
RUNNING_OPTIONS = (*BACKEND_OPTIONS, NO_CHECK)
RUNNING = ("threads", "backend", "device", "no_verify", "trusted_keys", "trust_engines", "no_check")
OUTPUT = click.option(
    "-o", "--output", required=True, type=FILE, help="The page; replaces an older page, nothing else."
)
COMPARE = click.option("--compare", is_flag=True, help="Answer without reduction, too, and show both side by side.")
PILLOW_PIXELS = 178_956_970
"""Above this Pillow refuses a picture by itself."""
_KINDS = "framefusion.kinds"
Command = TypeVar("Command", bound=Callable[..., Any])
Item = TypeVar("Item", int, float, str)

PROMPT = click.option("--prompt", required=True, help="What is asked, after videos and images.")

COST = click.option("--cost", type=float, help="Share of the computation over visual tokens that is kept, in (0, 1].")

QUESTION_OPTIONS = (
    click.option("--video", "videos", multiple=True, type=FILE, help="Film to show; repeatable, shown in order."),
    click.option("--image", "images", multiple=True, type=FILE, help="Picture to show; repeatable, shown in order."),
    PROMPT,
    click.option("--system", help="System prompt; default: the family's."),
    click.option("--max-new-tokens", type=COUNT, default=128, show_default=True, help="Of the answer."),
    COST,
    click.option("--reducer", help="What drops tokens: a name that `ff-run reducers` lists; default: the bundle's."),
    click.option("--similarity-lower-bound", type=float, help="Tokens at least this alike merge."),
    click.option("--ratio-lower-bound", type=float, help="Merging ends when a smaller share merges."),
    click.option("--temperature", type=float, help="Of drawn tokens; 0 takes the best one."),
    click.option("--top-p", type=float, help="Draw among the likeliest tokens of this total probability."),
    click.option("--top-k", type=int, help="Draw among this many tokens; 0 is off."),
    click.option("--seed", type=click.IntRange(min=0), help="Of drawn tokens and of the random reducer."),
    click.option("--fps", type=click.FloatRange(min=0, min_open=True), help="Frames sampled from a second of film."),
    click.option("--max-frames", type=COUNT, help="Most frames sampled."),
    click.option(
        "--max-image-pixels",
        type=click.IntRange(1, PILLOW_PIXELS),
        help="Largest picture read, width times height; default: 134 megapixels.",
    ),
    click.option("--max-frame-pixels", type=COUNT, help="Largest frame read of a film; default: 35 megapixels."),
    click.option("--max-film-frames", type=COUNT, help="Longest film read, all frames counted; default: a million."),
    click.option("--max-film-bytes", type=COUNT, help="Most memory for the sampled frames of a film; default: 8 GiB."),
    click.option(
        "--max-decoded-bytes",
        type=COUNT,
        help="Decoded of a film at most; default: 12 GiB and 4096 times the file.",
    ),
    click.option(
        "--max-film-seconds",
        type=float,
        help="Spent reading a film; default: 300, and one for each 100 kB of it.",
    ),
    click.option("--max-lost-share", type=float, help="Of a damaged film's frames, 0 to 1; default: 0.5."),
)
LIMITS = {
    "max_image_pixels": "image_pixels",
    "max_frame_pixels": "frame_pixels",
    "max_film_frames": "film_frames",
    "max_film_bytes": "film_bytes",
    "max_decoded_bytes": "decoded_bytes",
    "max_film_seconds": "film_seconds",
    "max_lost_share": "lost_share",
}
"""Flags, and the fields of MediaLimits that they set."""


class CommaList(ParamType, Generic[Item]):
    """Numbers or texts with commas between them."""

    def __init__(self, kind: type[Item]) -> None:
        self.kind: type[Item] = kind
        self.name = f"{kind.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Item, ...]:
        """Read "0.4,0.1"."""
        try:
            return value if isinstance(value, tuple) else tuple(map(self.kind, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is no list of {self.kind.__name__} with commas between them", param, ctx)


def question_options(command: Command) -> Command:
    """Add the flags of a question to a `VisualCommand`; `PromptOptions.from_flags` reads them."""
    return _with_options(command, QUESTION_OPTIONS)


def conversation_options(command: Command) -> Command:
    """Add the flags of a question but --prompt to a `VisualCommand`: messages come later."""
    return _with_options(command, [option for option in QUESTION_OPTIONS if option is not PROMPT])


def comparing_options(command: Command) -> Command:
    """Add the flags of a question but --cost to a `VisualCommand`: it has several."""
    return _with_options(command, [option for option in QUESTION_OPTIONS if option is not COST])


def backend_options(command: Command) -> Command:
    """Add the flags of how a bundle is opened, and on what backend."""
    return _with_options(command, BACKEND_OPTIONS)


def running_options(command: Command) -> Command:
    """Add the flags of how a bundle is run; `open_pipeline` of the command line reads them."""
    return _with_options(command, RUNNING_OPTIONS)


def _with_options(command: Command, options: Sequence[Callable[[Any], Any]]) -> Command:
    """Add flags, the first one at the top of `--help`."""
    for option in reversed(options):
        command = option(command)
    return command


def running_flags(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of `running_options`, taken out of what a command was given."""
    return {name: given.pop(name) for name in RUNNING}


class VisualCommand(click.Command):
    """Remembers in which order --video and --image were given; click keeps the order only within one option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the kinds of the visuals noted."""
        flags = (arg.partition("=")[0] for arg in args)
        ctx.meta[_KINDS] = [flag[2:] for flag in flags if flag in ("--video", "--image")]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class PromptOptions:
    """One prompt about videos and images, and how it is to be answered."""

    turns: Sequence[Turn]
    files: Sequence[Path]
    options: Mapping[str, Any]  # the other flags, by name; None where one was not given

    @classmethod
    def from_flags(
        cls, videos: Sequence[Path], images: Sequence[Path], prompt: str, system: str | None, **options: Any
    ) -> PromptOptions:
        """The flags of the command that runs."""
        from framefusion.runtime.text.prompt import Turn, Visual

        visuals = visuals_in_order(click.get_current_context().meta[_KINDS], videos, images)
        turns = [] if system is None else [Turn("system", (system,))]
        turns.append(Turn("user", (*(Visual(kind) for kind, _ in visuals), prompt)))
        return cls(turns, [file for _, file in visuals], options)

    def visuals(self) -> list[tuple[Visual, Path]]:
        """Kind and file of what is shown, in order."""
        from framefusion.runtime.text.prompt import Visual

        kinds = [part for turn in self.turns for part in turn.parts if isinstance(part, Visual)]
        return list(zip(kinds, self.files, strict=True))

    def request(self) -> Request:
        """What the flags say of an answer; the rest is as the bundle says."""
        from framefusion.runtime.pipeline import Request

        options = self.options
        return Request(
            max_new_tokens=options["max_new_tokens"],
            cost=options["cost"],
            similarity_lower_bound=options["similarity_lower_bound"],
            ratio_lower_bound=options["ratio_lower_bound"],
            seed=options["seed"],
            reducer=options["reducer"],
            temperature=options["temperature"],
            top_p=options["top_p"],
            top_k=options["top_k"],
        )

    def sampling(self, manifest: Manifest) -> FrameSampling:
        """Which frames of a film are looked at; what no flag says is as the bundle says."""
        return manifest.sampling.overridden(self.options["fps"], self.options["max_frames"])

    def limits(self) -> MediaLimits:
        """What files may hold; what no flag says is `MediaLimits()`."""
        from framefusion.runtime.media.media_file import MediaLimits

        given = {field: self.options[flag] for flag, field in LIMITS.items()}
        return MediaLimits(**{field: value for field, value in given.items() if value is not None})


def visuals_in_order(kinds: Sequence[str], videos: Sequence[Path], images: Sequence[Path]) -> list[tuple[str, Path]]:
    """Kind and file of each visual as they stood on the command line."""
    if kinds.count("video") != len(videos) or kinds.count("image") != len(images):  # a flag's name was a value
        kinds = ["video"] * len(videos) + ["image"] * len(images)
    files = {"video": iter(videos), "image": iter(images)}
    return [(kind, next(files[kind])) for kind in kinds]


def open_pipeline(
    folder: Path,
    threads: int,
    backend: str,
    device: str,
    no_verify: bool,
    trusted_keys: Path | None = None,
    trust_engines: bool = False,
    no_check: bool = False,
) -> Pipeline:
    """A bundle on the backend that the flags name, or on the best one that is right on this device."""
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.pipeline import Pipeline
    from framefusion.runtime.proof.opening import open_proven
    from framefusion.runtime.trust.origin import Trust

    name = None if backend == "auto" else backend
    place = None if device == "auto" else device
    with activity(f"opening {folder}", after=PATIENCE):
        bundle = Bundle(folder, verify=not no_verify, trust=Trust.of(trusted_keys, trust_engines))
        opened = open_proven(bundle, name, place, threads=threads, check=not no_check, say=console.log)
    return Pipeline(bundle, opened.backend, choice=opened.choice)
