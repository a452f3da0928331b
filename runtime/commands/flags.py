"""The flags of a question, as click takes them: what is shown, what is asked, and how it is answered.

Shared by every command that answers. Builds the runtime's objects of them; runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from framefusion.console import messages as console
from framefusion.console.help import Command as HelpCommand
from framefusion.console.help import option
from framefusion.console.terminal import PATIENCE, activity
from framefusion.runtime.backends import table
from framefusion.runtime.commands.question.prompt_text import read_prompt

if TYPE_CHECKING:
    from framefusion.runtime.format.manifest import Manifest
    from framefusion.runtime.media.frame_sampling import FrameSampling
    from framefusion.runtime.media.media_file import MediaLimits
    from framefusion.runtime.pipeline import Pipeline, Request
    from framefusion.runtime.text.prompt import Turn, Visual

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # generic only since click 8.2

FILE = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
MOST_THREADS = max(4 * (os.cpu_count() or 1), 64)  # beyond, a machine is only busy with changing between them
BACKENDS = ("auto", *table.backend_names())
DEVICES = ("auto", *table.DEVICES)
PILLOW_PIXELS = 178_956_970
"""Above this Pillow refuses a picture by itself."""
_ORDER = "framefusion.order"
Command = TypeVar("Command", bound=Callable[..., Any])
Item = TypeVar("Item", int, float, str)

# --- Where it runs ----------------------------------------------------------------------------------------------------

_running = partial(option, section="Where it runs")
_trust = partial(option, section="Trust in the bundle")
THREADS = _running(
    "--threads",
    type=click.IntRange(min=0, max=MOST_THREADS),
    default=0,
    help="Threads of one operator on the CPU; default: 0, one for each physical core that the process has.",
)
BACKEND = _running(
    "--backend",
    type=click.Choice(BACKENDS),
    metavar="NAME",
    default="auto",
    show_default=True,
    help=f"What runs the bundle: {', '.join(BACKENDS[1:])}; auto takes the best that it and this machine allow.",
)
DEVICE = _running(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="Kind of processor that the bundle runs on; auto takes that of the best backend.",
)
NO_CHECK = _running(
    "--no-check",
    is_flag=True,
    help="Answer without trying the backend on this device first, as a bundle's first answer does: see ff-run check.",
)
NO_VERIFY = _trust("--no-verify", is_flag=True, help="Do not compare the files of the bundle with their hashes.")
TRUSTED_KEYS = _trust(
    "--trusted-keys",
    type=FILE,
    envvar="FRAMEFUSION_TRUSTED_KEYS",
    show_envvar=True,
    help="Refuse a bundle that none of the ed25519 keys in this file signed; default: signatures are not looked at.",
)
TRUST_ENGINES = _trust(
    "--trust-engines",
    is_flag=True,
    help="Run the bundle's engines, which are code, though no trusted key signed it and they were not compiled here.",
)
BACKEND_OPTIONS = (THREADS, BACKEND, DEVICE, NO_VERIFY, TRUSTED_KEYS, TRUST_ENGINES)
RUNNING_OPTIONS = (THREADS, BACKEND, DEVICE, NO_CHECK, NO_VERIFY, TRUSTED_KEYS, TRUST_ENGINES)
RUNNING = ("threads", "backend", "device", "no_verify", "trusted_keys", "trust_engines", "no_check")

# --- What is shown and said, and how it is answered -------------------------------------------------------------------

_shown = partial(option, section="What is shown and asked")
_answer = partial(option, section="The answer")
_reduction = partial(option, section="Token reduction")
_frames = partial(option, section="Frames of a film")
_limits = partial(option, section="Limits on files")
OF_BUNDLE = "default: the bundle's"
OF_CHECKPOINT = "default: the checkpoint's"

OUTPUT = option(
    "--output",
    "-o",
    required=True,
    type=FILE,
    section="Output",
    help="File that the page is written to; an older page is replaced, nothing else is.",
)
COMPARE = option(
    "--compare/--no-compare",
    section="Output",
    default=None,
    help="Answer with every token, too, for the saving and the sameness; default: where something is reduced.",
)
OPEN = option("--open", "open_it", section="Output", is_flag=True, help="Open the page in a browser.")
_PROMPT_HELP = "- reads it from standard input, @FILE from a file, @@ begins one with an @."
PROMPT = _shown("--prompt", "-p", required=True, help=f"Question about the films and pictures; {_PROMPT_HELP}")
PROMPTS = _shown(
    "--prompt",
    "-p",
    "prompts",
    multiple=True,
    required=True,
    help=f"Question about the films and pictures; {_PROMPT_HELP} Several are answered one by one.",
)
EACH = _shown("--each", is_flag=True, help="Ask about each film and picture by itself, not about all together.")
COST = _reduction(
    "--cost",
    type=float,
    help=f"Share of the computation over visual tokens that is kept, above 0 up to 1; {OF_BUNDLE}.",
)
MAX_NEW_TOKENS = _answer(
    "--max-new-tokens", "-n", type=COUNT, default=128, show_default=True, help="Longest answer, counted in tokens."
)
TEMPERATURE = _answer(
    "--temperature",
    "-t",
    type=float,
    help=f"Draw tokens by chance, the bolder the higher; 0 always takes the likeliest; {OF_CHECKPOINT}.",
)
SEED = _answer(
    "--seed",
    type=click.IntRange(min=0),
    help="Number that fixes what is drawn by chance, also by the reducer random; default: other draws each time.",
)
REDUCER = _reduction("--reducer", help=f"What drops tokens: a name that ff-run reducers lists; {OF_BUNDLE}.")
FPS = _frames(
    "--fps", type=click.FloatRange(min=0, min_open=True), help=f"Frames taken from each second of film; {OF_BUNDLE}."
)
MAX_FRAMES = _frames("--max-frames", type=COUNT, help=f"Most frames taken from a film; {OF_BUNDLE}.")
QUESTION_OPTIONS = (
    _shown("--video", "-v", "videos", multiple=True, type=FILE, help="Film to show; repeatable, shown in order."),
    _shown("--image", "-i", "images", multiple=True, type=FILE, help="Picture to show; repeatable, shown in order."),
    PROMPT,
    _shown("--system", help="System prompt, which comes before the question; default: the model family's."),
    MAX_NEW_TOKENS,
    _answer(
        "--stop",
        multiple=True,
        help="End the answer before this text, which is not part of it; repeatable; default: no text.",
    ),
    TEMPERATURE,
    _answer(
        "--top-p",
        type=float,
        help=f"Draw among the likeliest tokens of this total probability; {OF_CHECKPOINT}.",
    ),
    _answer("--top-k", type=int, help=f"Draw among this many likeliest tokens; 0 is all; {OF_CHECKPOINT}."),
    _answer(
        "--repetition-penalty",
        type=float,
        help=f"Make tokens less likely that prompt or answer has already, the higher the less; 1 is off; "
        f"{OF_CHECKPOINT}.",
    ),
    SEED,
    COST,
    REDUCER,
    _reduction("--similarity-lower-bound", type=float, help=f"Merge tokens that are at least this alike; {OF_BUNDLE}."),
    _reduction(
        "--ratio-lower-bound",
        type=float,
        help=f"Stop merging after a layer where a smaller share of tokens merges; {OF_BUNDLE}.",
    ),
    FPS,
    MAX_FRAMES,
    _frames(
        "--num-frames",
        type=COUNT,
        help="Take this many frames, evenly spread, however long the film is; default: by --fps and --max-frames.",
    ),
    _limits(
        "--max-image-pixels",
        type=click.IntRange(1, PILLOW_PIXELS),
        help="Largest picture read, width times height; default: 134 megapixels.",
    ),
    _limits("--max-frame-pixels", type=COUNT, help="Largest frame read of a film; default: 35 megapixels."),
    _limits("--max-film-frames", type=COUNT, help="Longest film read, all frames counted; default: a million."),
    _limits("--max-film-bytes", type=COUNT, help="Most memory for a film's sampled frames; default: 8 GiB."),
    _limits(
        "--max-decoded-bytes",
        type=COUNT,
        help="Most bytes decoded of a film; default: 12 GiB and 4096 times the file.",
    ),
    _limits(
        "--max-film-seconds",
        type=float,
        help="Most seconds spent reading a film; default: 300, and one for each 100 kB of it.",
    ),
    _limits("--max-lost-share", type=float, help="Most of a damaged film's frames to do without; default: 0.5."),
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


def answering_options(command: Command) -> Command:
    """Add the flags of several questions to a `VisualCommand`."""
    options = list(QUESTION_OPTIONS)
    options[options.index(PROMPT)] = PROMPTS
    return _with_options(command, [*options, EACH])


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
    for add in reversed(options):
        command = add(command)
    return command


def running_flags(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of `running_options`, taken out of what a command was given."""
    return {name: given.pop(name) for name in RUNNING}


class VisualCommand(HelpCommand):
    """Remembers in which order --video and --image were given; click keeps the order only within one option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, with the kinds of the visuals noted."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        kinds = {"videos": "video", "images": "image"}
        ctx.meta[_ORDER] = [kinds[parameter.name] for parameter in order if parameter.name in kinds]
        rest = super().parse_args(ctx, args)
        for name in ("fps", "max_frames"):
            if None not in (ctx.params.get("num_frames"), ctx.params.get(name)):
                flag = name.replace("_", "-")
                raise click.UsageError(f"--num-frames and --{flag} choose frames both: leave one out", ctx)
        return rest


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
        visuals = flagged_visuals(videos, images)
        turns = turns_of([kind for kind, _ in visuals], read_prompt(prompt), system)
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
            stop=options["stop"],
            repetition_penalty=options["repetition_penalty"],
            temperature=options["temperature"],
            top_p=options["top_p"],
            top_k=options["top_k"],
        )

    def sampling(self, manifest: Manifest) -> FrameSampling:
        """Which frames of a film are looked at; what no flag says is as the bundle says."""
        options = self.options
        if options["num_frames"] is None:
            return manifest.sampling.overridden(options["fps"], options["max_frames"])
        return manifest.sampling.spread(options["num_frames"])

    def limits(self) -> MediaLimits:
        """What files may hold; what no flag says is `MediaLimits()`."""
        from framefusion.runtime.media.media_file import MediaLimits

        given = {field: self.options[flag] for flag, field in LIMITS.items()}
        return MediaLimits(**{field: value for field, value in given.items() if value is not None})


def flagged_visuals(videos: Sequence[Path], images: Sequence[Path]) -> list[tuple[str, Path]]:
    """Kind and file of every --video and --image of the command that runs, in order."""
    return visuals_in_order(click.get_current_context().meta[_ORDER], videos, images)


def turns_of(kinds: Sequence[str], prompt: str, system: str | None) -> list[Turn]:
    """A conversation of one question that shows videos and images before its text."""
    from framefusion.runtime.text.prompt import Turn, Visual

    turns = [] if system is None else [Turn("system", (system,))]
    return [*turns, Turn("user", (*(Visual(kind) for kind in kinds), prompt))]


def visuals_in_order(kinds: Sequence[str], videos: Sequence[Path], images: Sequence[Path]) -> list[tuple[str, Path]]:
    """Kind and file of each visual as they stood on the command line."""
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
    quiet: bool = False,
) -> Pipeline:
    """A bundle on the backend that the flags name, or on the best one that is right on this device."""
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.pipeline import Pipeline
    from framefusion.runtime.proof.opening import open_proven
    from framefusion.runtime.trust.origin import Trust

    name = None if backend == "auto" else backend
    place = None if device == "auto" else device
    say = (lambda _: None) if quiet else console.log
    with activity(f"opening {folder}", after=PATIENCE):
        bundle = Bundle(folder, verify=not no_verify, trust=Trust.of(trusted_keys, trust_engines))
        opened = open_proven(bundle, name, place, threads=threads, check=not no_check, say=say)
    return Pipeline(bundle, opened.backend, choice=opened.choice)
