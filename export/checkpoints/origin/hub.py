"""A checkpoint by name: a folder, or an id of the Hugging Face hub and the commit that it stands for.

Download, cache, token and offline mode are huggingface_hub's own, with its own settings (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT): this module says which files are wanted, and what went wrong. Knows no family.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import framefusion
from framefusion.errors import CheckpointError, FrameFusionError, StorageError
from framefusion.export.checkpoints.files import inner_name, read_json_file
from framefusion.installation import install_command

# Configuration, weights, tokenizer and chat template, and what the model card needs; no other weight format, no code.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*")
DEFAULT_REVISION = "main"
INDICES = "*.safetensors.index.json"
_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})$")  # how the hub's cache names a snapshot


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint is, and what it is called elsewhere.

    Attributes:
        folder: to read it from.
        name: its id on the hub, or the folder's name.
        on_hub: whether `name` is an id.
        revision: branch, tag or commit as the user gave it; None for a folder.
        commit: the commit that `folder` is a snapshot of, where that is known.
    """

    folder: Path
    name: str
    on_hub: bool = False
    revision: str | None = None
    commit: str | None = None


def origin_of(folder: Path) -> Origin:
    """A folder; one in the hub's cache says itself which id and commit it is."""
    resolved = folder.resolve()
    cached = _CACHED.search(resolved.as_posix())
    if cached is None:
        return Origin(folder, resolved.name)
    owner, model, commit = cached.groups()
    return Origin(folder, f"{owner}/{model}", on_hub=True, revision=commit, commit=commit)


def resolve(name: str | Path, revision: str | None = None) -> Origin:
    """Find a checkpoint, and download what is not in the cache.

    Args:
        name: a folder, which wins, or an id on the hub, ORGANISATION/MODEL.
        revision: branch, tag or commit on the hub; None takes main.

    Raises:
        CheckpointError: there is no such folder or id, no access to it, no connection, or a shard is missing.
        StorageError: the cache cannot be written.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision} belongs to an id on the hub, {name} is a folder: leave it out"
            )
        return origin_of(folder)
    if folder.is_file():
        raise CheckpointError(f"{name} is a file: give the folder that holds it, config.json and tokenizer")
    if str(name).count("/") != 1 or str(name).startswith(("/", ".", "~")):
        raise CheckpointError(
            f"no checkpoint folder at {name}, and an id on the hub is ORGANISATION/MODEL: give one of the two"
        )
    return _download(str(name), revision or DEFAULT_REVISION)


def missing_shards(folder: Path) -> Iterator[Path]:
    """Files that an index of the folder names and that are not there."""
    for index in sorted(folder.rglob(INDICES)):
        try:
            indexed = set(read_json_file(index, folder)["weight_map"].values())
        except (CheckpointError, KeyError, AttributeError, TypeError):
            continue  # whoever reads the weights says what is wrong with it
        names = sorted(name for name in indexed if inner_name(name))
        yield from (index.parent / name for name in names if not (index.parent / name).is_file())


def _download(name: str, revision: str) -> Origin:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"no checkpoint folder at {name}, and an id on the hub needs huggingface_hub: "
            f"{install_command('export')}, or give a folder"
        ) from None
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(WANTED),
            library_name="framefusion-aot",
            library_version=framefusion.__version__,
        )
    except Exception as error:
        refusal = _refusal(error, name, revision)
        if refusal is None:
            raise
        raise refusal from None
    lost = [path.name for path in missing_shards(Path(folder))]
    if lost:
        raise CheckpointError(
            f"{name} at {revision}: the cache lacks {len(lost)} of its shards ({', '.join(lost[:3])}): "
            f"complete it with hf download {name}, without HF_HUB_OFFLINE"
        )
    return Origin(Path(folder), name, on_hub=True, revision=revision, commit=Path(folder).name)


def _refusal(error: Exception, name: str, revision: str) -> FrameFusionError | None:
    """What a user can mend: id, cause and remedy; None for a bug."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    login = "log in with hf auth login or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"no checkpoint folder at {name}, and it is no id on the hub ({_line(error)})")
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{name} is gated and this account has no access: ask for it at {page}, then {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{name} has no revision {revision}: see {page}/tree/main, or leave --revision out")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{name} is neither a folder here nor a model at {constants.ENDPOINT} that this account may see: "
            f"check the name; if it is private, {login}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _unreachable(error, name, revision)
    if isinstance(error, (errors.HfHubHTTPError, errors.HTTPError)):  # type: ignore[attr-defined]  # of its HTTP client
        return CheckpointError(f"{name} could not be downloaded from {constants.ENDPOINT} ({_line(error)}): try again")
    if isinstance(error, OSError):
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
        return StorageError(f"{name} could not be written to {constants.HF_HUB_CACHE}, {reason}: set HF_HOME")
    return None


def _unreachable(error: Exception, name: str, revision: str) -> CheckpointError:
    """Not, or not all, in the cache, and no way to the hub."""
    from huggingface_hub import constants

    what = f"{name} at {revision} is not a folder here, nor complete in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(f"{what}, and HF_HUB_OFFLINE is set: unset it, or copy the cache of another machine")
    cause = _line(error.__cause__ or error)
    return CheckpointError(f"{what}, and {constants.ENDPOINT} gave no answer ({cause}): check the connection")


def _line(error: BaseException) -> str:
    """The first line of a message: the others are advice for programmers."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(" .:")
