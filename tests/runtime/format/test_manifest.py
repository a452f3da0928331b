"""A manifest of unknown origin: numbers have ranges, names stay in the folder, sizes agree, edits are noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BundleError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import SCHEMA_VERSION, Manifest, SegmentRecord
from framefusion.runtime.format.manifest_file import MANIFEST, read_manifest, read_manifest_file, write_manifest
from framefusion.runtime.format.manifest_rules import RULES
from framefusion.runtime.media.tower_kinds import TowerSettings
from framefusion.storage.bounded_json import JsonError, parse_json
from framefusion.storage.records import Rule
from tests.commands import assert_refused, export, run
from tests.runtime.bundle_edits import Edit, copied, edited, in_old_layout


def records(kind: type, visited: set[type]) -> Iterator[type]:
    """Every dataclass that a manifest is made of."""
    if kind in visited:
        return
    visited.add(kind)
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for inner in within(hint):
            for item in [inner, *subclasses(inner)]:
                yield from records(item, visited)


def within(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint):
        yield typing.cast(type, hint)
    for part in typing.get_args(hint):
        yield from within(part)


def subclasses(kind: type) -> list[type]:
    found: list[type] = kind.__subclasses__()
    return found + [deeper for item in found for deeper in subclasses(item)]


def holds_numbers(hint: Any) -> bool:
    if dataclasses.is_dataclass(hint):
        return False
    return hint in (int, float) or any(map(holds_numbers, typing.get_args(hint)))


def rules_of(kind: type) -> typing.Mapping[str, Rule]:
    """Rules of a class's own fields, wherever they are said."""
    return RULES.get(kind) or vars(kind).get("field_rules", {})


def test_every_number_of_a_manifest_has_a_range() -> None:
    kinds = list(records(Manifest, set()))
    assert len(kinds) > 20
    without = []
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            rules = [rules_of(item)[field.name] for item in kind.__mro__ if field.name in rules_of(item)]
            if holds_numbers(hints[field.name]) and not any(abs(rule.most) < 2**60 for rule in rules):
                without.append(f"{kind.__name__}.{field.name}")
    assert without == []


def test_every_rule_and_every_kind_of_tower_is_of_something_there_is() -> None:
    for kind in records(Manifest, set()):
        assert rules_of(kind).keys() <= {field.name for field in dataclasses.fields(kind)}, kind
    assert RULES.keys() <= set(records(Manifest, set()))
    kinds = subclasses(TowerSettings)
    assert len({kind.kind for kind in kinds}) == len(kinds) == 8  # type: ignore[attr-defined]
    assert all(kind.inputs or kind.kind == "plain" for kind in kinds)  # type: ignore[attr-defined]


def test_a_manifest_comes_back_as_it_was_written(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(tmp_path, manifest)
    assert read_manifest_file(tmp_path) == read_manifest_file(bundle)
    assert read_manifest_file(tmp_path).sealed
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_new_field_raises_the_schema() -> None:
    """A reader refuses a key that it does not know: by the schema alone it can say that it is the older one."""
    ours = [kind for kind in records(Manifest, set()) if kind.__module__.startswith("framefusion.")]
    fields = sorted({f"{kind.__name__}.{f.name}: {f.type}" for kind in ours for f in dataclasses.fields(kind)})
    assert len(fields) > 80
    digest = hashlib.sha256("\n".join(fields).encode()).hexdigest()[:16]
    assert (SCHEMA_VERSION, digest) == (6, "a1d1946291f5c1ff"), (
        "fields changed: raise SCHEMA_VERSION, and say here what is new"
    )


def test_a_manifest_of_schema_3_opens(bundle: Path, tmp_path: Path) -> None:
    """As packages wrote it before they knew of bytes and of quantised weights."""

    def forget(plain: dict[str, Any]) -> None:
        plain["schema_version"] = 3
        del plain["quantization"], plain["vision"]["input"]

    old = edited(copied(bundle, tmp_path / "old"), forget)
    opened = Bundle(old)
    assert opened.sealed
    vision = dataclasses.replace(opened.manifest.vision, input=read_manifest(bundle).vision.input)
    newer = dataclasses.replace(opened.manifest, schema_version=SCHEMA_VERSION, vision=vision)
    assert newer == read_manifest(bundle)


def test_a_manifest_of_schema_4_opens(bundle: Path, tmp_path: Path) -> None:
    """As packages wrote it before they knew of KV caches in another type."""

    def forget(plain: dict[str, Any]) -> None:
        plain["schema_version"] = 4
        del plain["kv_cache"]

    opened = Bundle(edited(copied(bundle, tmp_path / "old"), forget))
    assert dataclasses.replace(opened.manifest, schema_version=SCHEMA_VERSION) == read_manifest(bundle)


def test_a_manifest_of_an_older_package_opens_and_inspect_says_so(bundle: Path, tmp_path: Path) -> None:
    old = in_old_layout(copied(bundle, tmp_path / "old"))
    opened = Bundle(old)
    assert not opened.sealed
    assert dataclasses.replace(opened.manifest, schema_version=SCHEMA_VERSION) == read_manifest(bundle)
    assert "of an older package" in export("inspect", old).stdout
    integrity = json.loads(export("inspect", bundle, "--json").stdout)["integrity"]
    assert integrity == {"digest": read_manifest_file(bundle).digest, "sealed": True, "signatures": []}


@pytest.mark.parametrize("key", ["rope_theta", "vocab_size", "family", "num_layers"])
def test_an_edit_is_noticed_by_the_digest(bundle: Path, tmp_path: Path, key: str) -> None:
    """Also one that is in range and would only change the answer."""

    def change(plain: dict[str, Any]) -> None:
        value = plain["model"][key]
        plain["model"][key] = value + "x" if isinstance(value, str) else value - 1

    assert_refused(
        run("generate", edited(copied(bundle, tmp_path / "b"), change, sealed=False), "--prompt", "?", "--no-verify"),
        BundleError, "was edited or damaged", "digest",
    )  # fmt: skip


def test_a_manifest_that_lost_its_digest_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = copied(bundle, tmp_path / "b")
    plain = json.loads((other / MANIFEST).read_text())
    del plain["digest"]
    (other / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(BundleError, match="edited or damaged"):
        Bundle(other)


def put(*path: str | int, value: Any) -> Edit:
    """An edit of one value."""

    def edit(plain: Any) -> None:
        for key in path[:-1]:
            plain = plain[key]
        plain[path[-1]] = value

    return edit


def rename(old: str, new: str) -> Edit:
    """Call a file of the list something else."""

    def edit(plain: dict[str, Any]) -> None:
        plain["files"][new] = plain["files"].pop(old)

    return edit


def engine(**changes: Any) -> Edit:
    """Add one engine, sound but for what is changed and for its file, which is not there."""
    record = {
        "kind": "inductor", "graph": "vision/graph.onnx", "file": "engines/inductor/e.pt2", "library": "torch",
        "version": "1", "targets": ["cpu"], "dtype": "float32", "key": "k", "profiles": [], "tensors": [],
        "capacities": [], "weight_bytes": 0,
    }  # fmt: skip
    return put("engines", value=[record | changes])


EDITS: dict[str, tuple[Edit, str]] = {
    "a name that climbs": (rename("embedding.bin", "../embedding.bin"), "has an empty part, . or .."),
    "an absolute name": (put("embedding", "file", value="/etc/hostname"), "empty or absolute"),
    "a name with a control character": (put("segments", 0, "graph", value="a\x1b[2J"), "control character"),
    "an unlisted table": (rename("embedding.bin", "other.bin"), "embedding.bin is not listed"),
    "no tokenizer": (rename("tokenizer.json", "other.json"), "tokenizer.json is not listed"),
    "an unknown key": (put("model", "vocabsize", value=5), "'vocabsize' is no key of it"),
    "an unknown key on top": (put("extra", value={}), "'extra' is no key of it"),
    "another type": (put("model", "num_layers", value="4"), "model.num_layers: expected int"),
    "a truth as a number": (put("model", "num_layers", value=True), "model.num_layers: expected int"),
    "a negative size": (put("model", "hidden_size", value=-32), "model.hidden_size: expected a number, 1 or more"),
    "a size beyond memory": (put("embedding", "rows", value=1 << 60), "embedding.rows"),
    "a table of fewer rows": (put("embedding", "rows", value=300), "rows of 32 in float32 are 38400 bytes"),
    "another width": (put("model", "hidden_size", value=64), "embedding.width: 32 is not"),
    "no cost": (put("reduction", "cost", value=0), "reduction.cost"),
    "a cost of nothing real": (put("reduction", "cost", value="0.5"), "reduction.cost: expected float"),
    "a reduction after the last layer": (put("reduction", "depth", value=3), "reduction.depth: 3 is beyond 2"),
    "no cosine": (put("reduction", "similarity_lower_bound", value=2), "reduction.similarity_lower_bound"),
    "no share": (put("reduction", "ratio_lower_bound", value=1), "reduction.ratio_lower_bound"),
    "a layer twice": (put("segments", 1, "attention_layers", value=[0]), "attention layers are not 0 to 3"),
    "two heads": (put("segments", 0, "head", value=True), "the last one, and no other, has the head"),
    "a hash of no form": (put("files", "embedding.bin", "sha256", value="x"), "files.'embedding.bin'.sha256"),
    "a rule as a list": (put("preprocessing", "rule", value=["qwen_vl"]), "preprocessing.rule: expected one of"),
    "a patch of no size": (put("preprocessing", "patch_size", value=0), "preprocessing.patch_size"),
    "other patches": (put("preprocessing", "patch_size", value=7), "vision.patch_width"),
    "sampling of no frame": (put("sampling", "fps", value=0.0), "sampling.fps"),
    "an unknown rule of sampling": (put("sampling", "rule", value="mine"), "sampling: sampling rule 'mine'"),
    "an unknown kind of tower": (put("vision", "kind", value="mine"), "vision.kind: expected one of"),
    "a setting of another kind": (put("vision", "settings", "rows", value=4), "'rows' is no key of it"),
    "bytes of a kind that is none": (put("vision", "input", value="int8"), "vision.input"),
    "no setting": (put("vision", "settings", value={}), "vision.settings.merge_size is missing"),
    "settings of no kind": (put("vision", "settings", "merge_size", value=None), "vision.settings.merge_size"),
    "settings that divide by zero": (put("vision", "settings", "merge_size", value=0), "vision.settings.merge_size"),
    "an end beyond the tokens": (put("generation", "eos_token_ids", value=[10**6]), "generation.eos_token_ids"),
    "more prompt than cache": (put("limits", "max_input_len", value=4096), "does not fit"),
    "buckets that descend": (put("segments", 0, "buckets", value=[512, 256]), "are not ascending"),
    "a terminal's orders": (put("tools", "torch", value="\x1b]0;mine\x07"), "without control characters"),
    "a line that runs backwards": (put("source", "name", value="a\u202eb"), "without control characters"),
    "an engine of another kind": (engine(kind="onednn"), "kind: expected one of tensorrt, tensorrt-rtx"),
    "an engine of another module": (engine(library="antigravity"), "antigravity does not load inductor"),
    "an engine that is not listed": (engine(), "engines/inductor/e.pt2 is not listed"),
    "an engine for nothing": (engine(graph="other.onnx"), "other.onnx is no graph of this bundle"),
    "a report that shows nothing": (put("check", "tolerance", value=-1), "check.tolerance"),
    "pictures beyond memory": (put("preprocessing", "min_pixels", value=1 << 30), "preprocessing"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_what_no_build_writes_is_refused_though_the_digest_agrees(bundle: Path, tmp_path: Path, name: str) -> None:
    edit, phrase = EDITS[name]
    (tmp_path / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes())
    edited(tmp_path, edit)
    with pytest.raises(BundleError) as refused:
        read_manifest(tmp_path)
    assert phrase in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b'{"schema_version": NaN}', "NaN"),
        (b'{"schema_version": 3, "schema_version": 2}', "stands twice"),
        (b'{"schema_version": 1e999}', "beyond a double"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "beyond 64 bits"),
        (b"[" * 100_000, "more than 64 levels"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b"\xff\xfe", "decode"),
        (b"7", "has no schema_version"),
        (b'{"schema_version": true}', "has no schema_version"),
        (b'{"schema_version": 1}', "schema version 1"),
        (b" " * ((1 << 24) + 1), "more than 16777216 bytes"),
        (b"[" + b"1," * (1 << 20) + b"1]", "more than 524288 values"),
    ],
    ids=[
        "nan",
        "twice",
        "infinite",
        "digits",
        "deep",
        "surrogate",
        "no-text",
        "number",
        "truth",
        "old",
        "long",
        "many",
    ],
)
def test_json_that_is_none_of_ours(tmp_path: Path, content: bytes, phrase: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=phrase):
        read_manifest(tmp_path)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(BundleError, match="no regular file"):
        read_manifest(tmp_path)


def test_depth_counts_no_brackets_in_texts() -> None:
    nested = b'{"a": ["[[[[{{", "\\"[[["]}'
    assert parse_json(nested, most_depth=2) == {"a": ["[[[[{{", '"[[[']}
    with pytest.raises(JsonError, match="more than 1 levels"):
        parse_json(nested, most_depth=1)


def test_a_segment_names_its_graphs_by_what_they_run() -> None:
    shared = SegmentRecord("decoder", "g.onnx", (0, 1), 2, scores=False, head=True, weight_bytes=0, buckets=None)
    assert (shared.prefill, shared.decode, shared.graphs) == ("g.onnx", "g.onnx", ("g.onnx",))
    apart = dataclasses.replace(shared, decode_graph="d.onnx")
    assert (apart.prefill, apart.decode, apart.graphs) == ("g.onnx", "d.onnx", ("g.onnx", "d.onnx"))
