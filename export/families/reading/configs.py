"""What families read from a checkpoint's files in the same way: configs, processors, sampling, generation. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.class_defaults import completed
from framefusion.export.checkpoints.text.generation_file import read_generation
from framefusion.export.checkpoints.text.sentencepiece_tokenizer import begin_token, needed
from framefusion.export.checkpoints.text.tokenizer_file import added_tokens, tokenizer_of
from framefusion.export.families.reading.formats import format_of, llm_config, token_id, whole_types
from framefusion.runtime.text.prompt import PromptTemplate
from framefusion.runtime.text.sampling import GenerationConfig

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint


def text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The LLM's configuration: of its own folder, nested in config.json under the key of its class, or flat.

    What it leaves out is as its class in transformers has it, `model_type` too.
    """
    config_format = format_of(checkpoint.config)
    kind = config_format.llm_type
    nested = checkpoint.part_config("llm") or llm_config(checkpoint.config)
    if nested is not None:
        return completed(nested, kind, whole_types())
    flat = {**checkpoint.config, **config_format.overridden}
    return completed(flat | {"model_type": kind} if kind else flat)


def vision_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The vision tower's configuration within config.json, with what its class in transformers fills in.

    Some classes make a tower of their defaults where there is none at all; the others want to know which.

    Raises:
        CheckpointError: there is none, or it is no object.
    """
    config_format = format_of(checkpoint.config)
    absent = config_format.default_tower and checkpoint.config.get("vision_config") is None
    nested = {} if absent else required(checkpoint.config, "vision_config", checkpoint)
    if not isinstance(nested, dict):
        raise CheckpointError(f"{checkpoint.folder}/config.json has vision_config {nested!r:.80}, expected an object")
    return completed(nested, config_format.vision_type, whole_types())


def prefix_of(checkpoint: Checkpoint, key: str, prefixes: Sequence[str], part: str = "vision tower") -> str:
    """The first prefix under which a tensor is stored; names changed between releases of transformers.

    Args:
        checkpoint: where it is looked for.
        key: of the tensor, behind the prefix.
        prefixes: newest first.
        part: of the model, for the message.

    Raises:
        CheckpointError: it is stored under none.
    """
    for prefix in prefixes:
        if prefix + key in checkpoint:
            return prefix
    tried = ", ".join(prefix + key for prefix in prefixes)
    raise CheckpointError(f"{checkpoint.folder} has no {part} under any known name ({tried})")


def required(config: Mapping[str, Any], key: str, checkpoint: Checkpoint) -> Any:
    """A value of the configuration that has no default.

    Raises:
        CheckpointError: the key is absent or null.
    """
    if config.get(key) is None:
        raise CheckpointError(f"{checkpoint.folder}/config.json has no {key}: the checkpoint is incomplete")
    return config[key]


def given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of the configuration; null is no value."""
    value = config.get(key)
    return default if value is None else value


def square(config: Mapping[str, Any], key: str, checkpoint: Checkpoint) -> int:
    """A side in pixels, which newer files write for both directions.

    Raises:
        CheckpointError: the key is absent, or names two different sides.
    """
    value = required(config, key, checkpoint)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) != 1:
        raise CheckpointError(f"{checkpoint.folder}/config.json has {key} {value}: only squares are supported")
    return int(sides.pop())


def expect(checkpoint: Checkpoint, config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse values that the graph and the rules are not made for; a key that is absent has the first one.

    Raises:
        CheckpointError: naming the key, its value and what is supported.
    """
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            raise CheckpointError(
                f"{checkpoint.folder}: {key} is {config[key]!r}, supported is {' or '.join(map(repr, values))} only"
            )


def with_pads(checkpoint: Checkpoint, template: PromptTemplate, keys: Mapping[str, str]) -> PromptTemplate:
    """The template with the ids that config.json says the pad tokens have; `keys` is token -> key."""
    ids = {key: token_id(checkpoint.config, key) for key in keys.values()}
    return replace(template, pads={token: int(required(ids, key, checkpoint)) for token, key in keys.items()})


def tokenizer_begin(checkpoint: Checkpoint) -> str:
    """What the checkpoint's tokenizer puts before every text."""
    if needed(checkpoint):
        return begin_token(checkpoint)
    backend = tokenizer_of(checkpoint)
    with_begin = backend.encode("a", add_special_tokens=True)
    bare = backend.encode("a", add_special_tokens=False)
    return "".join(with_begin.tokens[: with_begin.ids.index(bare.ids[0])]) if bare.ids else ""


def with_begin(checkpoint: Checkpoint, layout: PromptTemplate) -> PromptTemplate:
    """The layout behind what the tokenizer puts before every text, unless the layout says that itself.

    A tokenizer may read the first word of a text as if a space stood before it; then one does.
    """
    begin = tokenizer_begin(checkpoint)
    if begin and layout.begin.startswith(begin):
        return layout
    tokenizer = checkpoint.read_optional_json("tokenizer.json")
    splitter = tokenizer.get("pre_tokenizer") or {}
    controls = added_tokens(checkpoint)
    schemes = [part.get("prepend_scheme") for part in (splitter, *splitter.get("pretokenizers", ()))]
    opening = layout.begin or layout.turns["system" if layout.default_system else "user"].prefix
    mark = " " if "first" in schemes and not opening.startswith(tuple(controls)) else ""
    return replace(layout, begin=begin + mark + layout.begin)


def generation(checkpoint: Checkpoint, terminators: Sequence[int] = ()) -> GenerationConfig:
    """How the checkpoint chooses tokens: see `generation_file.read_generation`."""
    return read_generation(checkpoint, text_config(checkpoint), terminators)


def check_tokens(checkpoint: Checkpoint, tokens: Sequence[str]) -> None:
    """Refuse a tokenizer without one of these control tokens.

    Raises:
        CheckpointError: naming what is missing.
    """
    known = added_tokens(checkpoint)
    missing = [token for token in tokens if token not in known]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder}/tokenizer.json has no token {', '.join(missing)} among its added_tokens: "
            "the checkpoint is incomplete"
        )


def check_rows(checkpoint: Checkpoint, texts: Iterable[object], rows: int) -> None:
    """Refuse an embedding table without a row for a control token that prompts hold.

    Args:
        checkpoint: whose tokenizer says the ids.
        texts: what stands in prompts; what is no text is passed over.
        rows: of the embedding table.

    Raises:
        CheckpointError: naming the token, its id and the size of the table.
    """
    written = "\n".join(text for text in texts if isinstance(text, str))
    for token, index in added_tokens(checkpoint).items():
        if index >= rows and token in written:
            raise CheckpointError(
                f"{checkpoint.folder}: {token} is token {index}, the embedding table has {rows} rows: the tokenizer is "
                "of another model, or the table was not resized when tokens were added"
            )


def check_placeholders(checkpoint: Checkpoint, template: PromptTemplate, rows: int) -> None:
    """Refuse pad tokens without a row in an embedding table of `rows` rows.

    Raises:
        CheckpointError: naming the token and its id.
    """
    for token, index in template.pads.items():
        if not 0 <= index < rows:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json says that {token} is token {index}, the embedding table has {rows} "
                "rows: config.json is of another model, or the table was not resized"
            )


def check_pads(checkpoint: Checkpoint, template: PromptTemplate) -> None:
    """Refuse a config.json that gives the pad tokens other ids than the tokenizer.

    Raises:
        CheckpointError: naming the token and both ids.
    """
    check_tokens(checkpoint, list(template.pads))
    known = added_tokens(checkpoint)
    for token, index in template.pads.items():
        if known[token] != index:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json says that {token} is id {index}, in the tokenizer it is "
                f"{known[token]}: correct config.json, or take the tokenizer that belongs to it"
            )
