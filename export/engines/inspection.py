"""What a bundle's engines are and what each choice in them costs in bytes: part of `ff-export inspect`. Loads none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from framefusion.console.messages import in_bytes, table
from framefusion.runtime.backends import table as backends
from framefusion.runtime.backends.fit import gpu_memory, is_cpu
from framefusion.runtime.backends.tensorrt.memory import common_batch_sizes, engine_memory
from framefusion.runtime.format.engine_record import EngineRecord
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.memory import table_bytes
from framefusion.storage.records import to_json


def engine_facts(manifest: Manifest) -> list[dict[str, Any]]:
    """One entry for each kind of engine in a bundle, as plain values."""
    kinds = dict.fromkeys(engine.kind for engine in manifest.engines)
    return [_kind_facts(manifest, [e for e in manifest.engines if e.kind == kind]) for kind in kinds]


def _kind_facts(manifest: Manifest, engines: Sequence[EngineRecord]) -> dict[str, Any]:
    first = engines[0]
    rows = [_engine_facts(manifest, engine) for engine in engines]
    total = {name: sum(row[name] for row in rows) for name in ("bytes", "weight_bytes", "beyond_weights")}
    device: backends.Device = "cpu" if is_cpu(first) else "cuda"
    sizes = common_batch_sizes(manifest, first.kind)
    one_token = sum(row["weight_bytes"] for row in rows if row["capacities"])
    return {
        "kind": first.kind,
        "library": first.library,
        "version": first.version,
        "targets": list(first.targets),
        "dtype": first.dtype,
        "needs": backends.engine_traits(first.kind).needs,
        "experimental": device not in backends.backend(first.kind, device).results,
        "engines": rows,
        "device_bytes": gpu_memory(manifest, first.kind),
        "max_batch_size": max(sizes, default=1),
        "batch_bytes": engine_memory(manifest, first.kind).slabs,
        "embedding_bytes": 0 if device == "cpu" else table_bytes(manifest),
        "one_token_profile_bytes": one_token if any(engine.profiles for engine in engines) else None,
        "graphs_kept": all(engine.graph in manifest.files for engine in engines),
        **total,
    }


def _engine_facts(manifest: Manifest, engine: EngineRecord) -> dict[str, Any]:
    size = manifest.files[engine.file].size
    return {
        "graph": engine.graph,
        "file": engine.file,
        "key": engine.key,
        "bytes": size,
        "weight_bytes": engine.weight_bytes,
        "beyond_weights": size - engine.weight_bytes,
        "profile_bytes": (size - engine.weight_bytes) // max(len(engine.profiles), 1),
        "profiles": to_json(engine.profiles),
        "capacities": list(engine.capacities),
        "options": dict(engine.options),
    }


def engine_block(facts: Mapping[str, Any]) -> str:
    """A kind of engines as a table, and what its choices cost."""
    names = ("engine", "size", "weights", "profiles", "each costs", "cache slots")
    rows = [
        (
            row["graph"], in_bytes(row["bytes"]), in_bytes(row["weight_bytes"]), _profiles(row["profiles"]),
            in_bytes(row["profile_bytes"]), _slots(row["capacities"]),
        )
        for row in facts["engines"]
    ]  # fmt: skip
    head = (
        f"{facts['kind']} engines, {facts['dtype']}, by {facts['library']} {facts['version']} for "
        f"{', '.join(facts['targets'])}: {facts['needs']}"
    )
    code = f"kernels take {in_bytes(facts['beyond_weights'])}"
    if facts["weight_bytes"]:
        code = f"weights take {in_bytes(facts['weight_bytes'])}, once for all profiles and targets; {code}"
        code += f", {facts['beyond_weights'] / facts['weight_bytes']:.1%} of the weights"
    tail = [code]
    variants = sorted({str(row["options"]["variant"]) for row in facts["engines"] if "variant" in row["options"]})
    if variants:
        tail.append(f"networks are {', '.join(variants)}: without the library's layers for attention over a cache")
    buckets = sum(row["profile_bytes"] for row in facts["engines"] if row["capacities"])
    if buckets:
        tail.append(f"one bucket more costs about {in_bytes(buckets)}, one target more next to nothing")
    if facts["one_token_profile_bytes"] is not None:
        tail.append(
            "decoding runs two tokens wide on the same weights; a profile of one token would copy them, "
            f"{in_bytes(facts['one_token_profile_bytes'])} more"
        )
    table_line = ""
    if facts["embedding_bytes"]:
        table_line = f"; the embedding table {in_bytes(facts['embedding_bytes'])} more, where an eighth of what is free"
        table_line += " takes it"
    tail.append(f"engines and caches take at least {in_bytes(facts['device_bytes'])} on the device{table_line}")
    if facts["max_batch_size"] > 1:
        tail.append(
            f"up to {facts['max_batch_size']} requests are decoded in a step, by {in_bytes(facts['batch_bytes'])} more "
            "of caches, from the first batch on"
        )
    if not facts["graphs_kept"]:
        tail.append("the graphs were left out (--engines-only): no run on the CPU, no check, no further engines")
    if facts["experimental"]:
        tail.append("experimental: no committed result, with a device's name, shows that they run")
    return "\n".join([head, table(names, rows), *tail])


def _profiles(profiles: Sequence[Mapping[str, Any]]) -> str:
    """Sizes of the profiles: "512, 1024, 2, 4 x 1" of four rows, "3 ranges", or "any"."""
    sizes = []
    for profile in profiles:
        if profile["tokens"] is not None:
            rows = profile["shapes"].get("hidden", [[1]])[0][0]
            sizes.append(f"{rows} x {profile['tokens']}" if rows > 1 else str(profile["tokens"]))
    return ", ".join(sizes) or (f"{len(profiles)} ranges" if profiles else "any")


def _slots(capacities: Sequence[int]) -> str:
    distinct = sorted(set(capacities))
    if not distinct:
        return "-"
    return f"{len(capacities)} x {'-'.join(map(str, dict.fromkeys((distinct[0], distinct[-1]))))}"
