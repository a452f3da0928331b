"""The tables of the pages: figures from tools/bench/results/*.json, families from their rows; nothing typed by hand.

python -m tools.numbers            # writes them into README.md and the pages under docs/
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from framefusion.export.families import FAMILIES
from tools import film_tables, quantized_tables
from tools.tiny.clips import STAY, STAYS, Span

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools" / "bench" / "results"
PAPER = {"dense": 1900.6, "cost 0.7": 1547.2, "cost 0.5": 1317.3, "cost 0.3": 1111.8}
NOT_MEASURED = "Their seconds side by side: `python -m tools.bench.backends --write`, then `python -m tools.numbers`."
TYPES_AT = 0.3  # cost of the table by types
PAGES = (
    "README.md",
    "docs/numbers.md",
    "docs/families.md",
    "docs/batch.md",
    "docs/checks.md",
    "docs/engines.md",
    "docs/films.md",
    "docs/quantisation.md",
    "docs/server.md",
)


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str) -> str:
    """A page with the tables between its markers, `<!-- NAME -->` and `<!-- /NAME -->`."""
    for name, tables in TABLES.items():
        start = f"<!-- {name} -->"
        end = f"<!-- /{name} -->"
        if start in page:
            block = f"{start}\n\n{tables()}\n\n{end}"
            page = re.sub(f"{start}.*{end}", lambda _, block=block: block, page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def figures() -> str:
    """The four figures of the README, each beside what it is compared with."""
    speed = load("prefill")
    reduced = speed["ours at cost 0.3"]
    against_eager = speed["eager"]["prefill"]["median_s"] / reduced["prefill"]["median_s"]
    brief = load("accuracy_brief")
    right = {(row["reducer"], row["cost"]): f"{percent(row['accuracy'])} %" for row in brief["accuracy"]}
    export = load("export_memory")
    check = load("export_check")["checked"]["phases"]["check"]
    install = load("install_size")
    ours = install["runtime"]
    theirs = install["eager torch"]
    rows = [
        (
            "speed: prefill at cost 0.3",
            f"**{reduced['speed_up']:.2f}x** of the same bundle at cost 1, {against_eager:.2f}x of eager torch",
            f"{reduced['flop_limit']:.2f}x by operations alone",
            f"`{speed['command']}`",
        ),
        (
            "accuracy at cost 0.3, brief events",
            f"**{right['framefusion', 0.3]}** right",
            f"{right['none', 1.0]} with every token, {right['uniform', 0.3]} with fewer frames",
            f"`{brief['command']}`",
        ),
        (
            "memory of an export without the check, 7B shape",
            f"**{export['adaptive']['high_water_gb']:.2f} GB**, with it {check['anonymous_gb']:.1f} GB",
            f"a checkpoint of {export['checkpoint_gb']:.1f} GB",
            f"`{export['command']}`",
        ),
        (
            "install that answers",
            f"**{ours['mb']:.0f} MB**, imported in {ours['import_s']:.2f} s of a core",
            f"{theirs['mb']:.0f} MB and {theirs['import_s']:.1f} s for transformers with torch's CPU build",
            f"`{install['command']}`",
        ),
    ]  # fmt: skip
    return table(("", "measured", "beside", "command"), rows)


def numbers() -> str:
    """Every table of figures, in the order of docs/numbers.md."""
    parts = [prefill(load("prefill")), memory(load("memory")), exporting(load("export_memory"))]
    parts += [checking(load("export_check"))]
    parts += [accuracy(load("accuracy")), accuracy(load("accuracy_brief"), STAYS["brief"])]
    parts += [on_gpu(load(path.stem)) for path in sorted(RESULTS.glob("prefill_*.json"))]
    return "\n\n".join(parts)


def checkpoints() -> str:
    return table(("family", "checkpoints"), [(f"`{row.name}`", ", ".join(row.checkpoints)) for row in FAMILIES])


def families() -> str:
    rows = [(f"`{row.name}`", ", ".join(row.checkpoints), row.verified) for row in FAMILIES]
    return table(("family", "checkpoints", "verified against"), rows)


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def prefill(result: dict[str, Any]) -> str:
    eager = result["eager"]
    products = result["matmul_gflops"]
    rows = [("transformers, eager torch", *seconds(eager), *["-"] * 4)]
    for name, case in result.items():
        if name.startswith("ours at cost"):
            rows.append(
                (
                    name, *seconds(case), f"{case['speed_up']:.2f}", f"{case['flop_limit']:.2f}",
                    f"{case['share_of_limit']:.0%}", f"{case['not_layers_share']:.1%}",
                )
            )  # fmt: skip
    names = ("", "prefill s", "decode ms a token", "speed-up", "FLOP limit", "of the limit", "not layers")
    return (
        f"Prefill of {result['tokens']} tokens, {result['shape']} shape, fp32, {result['threads']} threads "
        f"(`{result['command']}`; {machine(result)}):\n\n{table(names, rows)}\n\n"
        "Speed-up and limit are against ours at cost 1. Ours dense is "
        f"{result['dense_speed_up_over_eager']:.2f} times as fast as eager torch on this machine: what it gains in the "
        f"matrix products ({products['onnxruntime']} GFLOP/s against {products['torch']}), its attention over the "
        "whole prompt mostly loses again."
    )


def backends(result: dict[str, Any]) -> str:
    """Backends of one machine side by side, each beside the first."""
    costs = [f"ours at cost {cost:g}" for cost in result["costs"]]
    rows = []
    for name, contender in result["contenders"].items():
        memory = contender["memory"]
        dense = contender[costs[0]]
        prefills = [f"{each['prefill']['median_s']:.2f} ({each['prefill_speed_up']:.2f}x)" for each in
                    (contender[cost] for cost in costs)]  # fmt: skip
        rows.append(
            (
                f"`{name.partition(':')[0]}`", contender["dtype"], contender["computes"], *prefills,
                f"{1000 * dense['decode_per_token']['median_s']:.0f} ({dense['decode_speed_up']:.2f}x)",
                f"{dense['logits_relative_error']:.1e}",
                f"{memory['anonymous_answered_mb']:.0f} + {memory['mapped_answered_mb']:.0f}",
            )
        )  # fmt: skip
    seconds = [f"prefill s, cost {cost:g}" for cost in result["costs"]]
    names = ("", "bundle", "products", *seconds, "decode ms", "error of logits", "memory MB: its own + mapped")
    return (
        f"{result['tokens']} tokens, {result['shape']} shape, {result['threads']} threads, in turn in one process "
        f"(`{result['command']}`; {machine(result)}, openvino {result['machine']['openvino']}, load "
        f"{result['machine']['load_before']:g} beside it). Speed-ups and errors are against the first; memory is what "
        f"a process of its own grows by, from its imports to its first dense answer:\n\n{table(names, rows)}"
    )


def serving(result: dict[str, Any]) -> str:
    """Several clients of a server at once beside one after the other, first tokens, and room in the cache."""
    rows = []
    for name, case in result.items():
        if not name.startswith("cost "):
            continue
        alone = case["one_after_the_other"]
        together = case["at_once"]
        waiting = case["first_token_under_a_prefill"]["first_token"]
        quiet = case["first_token_under_a_prefill"]["first_token_with_nobody_else"]
        rows.append(
            (
                f"at {name}",
                *(f"{alone[f'{part}_tokens_per_second']:.1f} -> {together[f'{part}_tokens_per_second']:.1f} "
                  f"({case[f'{part}_ratio']:.1f}x)" for part in ("decoding", "whole")),
                f"{waiting['p50_s']:.2f}", f"{waiting['p95_s']:.2f}", f"{quiet['p50_s']:.2f}",
                str(result["room"]["requests"][name]["count"]),
            )
        )  # fmt: skip
    gigabytes = result["room"]["gigabytes"]
    names = (
        "", "decoding, tokens/s", "prefills included, tokens/s", "first token under a prefill s, p50", "p95",
        "with nobody else", f"requests in {gigabytes} GB",
    )  # fmt: skip
    wrong = sum(case["wrong"] for name, case in result.items() if name.startswith("cost "))
    answers = sum(case["answers"] for name, case in result.items() if name.startswith("cost "))
    return (
        f"{result['clients']} clients one after the other -> at once, {result['shape']} shape, films of "
        f"{result['film']}, answers of {result['new_tokens']} tokens, {result['threads']} threads "
        f"(`{result['command']}`; {machine(result)}):\n\n{table(names, rows)}\n\n"
        f'{wrong} of {answers} answers were not those of the request alone. "Decoding" is of second questions, whose '
        "films are in the caches. A first token is that of a short question which comes while a film is decoded and "
        "prefilled."
    )


def serving_or_how() -> str:
    """The table, or how to measure it."""
    if (RESULTS / "serve.json").is_file():
        return serving(load("serve"))
    return "Not measured on this version yet: `python -m tools.bench.serve --write`."


def on_gpu(result: dict[str, Any]) -> str:
    """Time by stage of a backend that has a result of its own."""
    rows = []
    for name, stages in result["stages"].items():
        case = result[name]
        names = ("vision", "prefill", "reduction", "decode")
        faster = case["speed_up_over_eager"]
        rows.append(
            (
                name, *(f"{1000 * stages[stage]:.1f}" for stage in names), f"{case['speed_up']:.2f}",
                f"{case['share_of_limit']:.0%}", f"{faster['prefill']:.2f}", f"{faster['decode']:.2f}",
            )
        )  # fmt: skip
    head = ("", "vision ms", "prefill ms", "reduction ms", "decode ms", "speed-up", "of the FLOP limit")
    paper = ", ".join(f"{cost}: {milliseconds} ms" for cost, milliseconds in PAPER.items())
    device = result["machine"]["gpu"]["name"] if result["backend"]["device"] == "cuda" else result["machine"]["cpu"]
    return (
        f"{result['backend']['name']} on {device}, {result['shape']} shape, {result['dtype']}, "
        f"a film of {result['film']}, {result['tokens']} tokens (`{result['command']}`); the last two columns are "
        f"against eager torch with SDPA at the same tokens:\n\n{table((*head, 'prefill', 'decode'), rows)}\n\n"
        "The paper's whole requests up to the first token, LLaVA-Video-7B, 64 frames, on a GPU that it does not "
        f"name: {paper}."
    )


def seconds(case: dict[str, Any]) -> tuple[str, str]:
    return f"{case['prefill']['median_s']:.2f}", f"{1000 * case['decode_per_token']['median_s']:.0f}"


def checking(result: dict[str, Any]) -> str:
    """A build that was compared with transformers, larger than memory."""
    run = result["checked"]
    check = run["phases"]["check"]
    facts = run["check"]["transformers"]
    return (
        f"The same with its check, all {facts['layers']} layers against transformers' "
        f"{' and '.join(facts['classes'])} and the bundle in ONNX Runtime against them, weights read from the disk as "
        f"they are used (`{result['command']}`): the check took {check['seconds']:.0f} s on two cores that other work "
        f"kept busy and {check['anonymous_gb']:.1f} GB of memory of its own; the largest error against transformers is "
        f"{max(facts['errors'].values()):.1e}."
    )


def memory(result: dict[str, Any]) -> str:
    rows = [
        (name, case["prompt_tokens"], case["measured_mb"], case["planned_mb"], f"{case['measured_over_planned']:.3f}")
        for name, case in result.items()
        if name.startswith("cost")
    ]
    names = ("", "tokens of prompt", "measured MB", "planned MB", "ratio")
    return (
        f"Peak resident memory of the runtime on a real film, {result['shape']} shape, beside the plan of "
        f"`ff-export inspect` (`{result['command']}`):\n\n{table(names, rows)}"
    )


def exporting(result: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("cp of the checkpoint", f"{result['copy']['seconds']:.0f}", "1.00", "-", "-")]
    for mode in ("adaptive", "fixed"):
        run = result[mode]
        peak = f"{run['high_water_gb']:.2f}"
        anonymous = f"{run['anonymous_gb']:.2f}"
        rows.append((f"build, {mode}", f"{run['seconds']:.0f}", f"{run['times_the_copy']:.2f}", peak, anonymous))
    names = ("", "seconds", "times the copy", "peak RSS GB", "of it anonymous GB")
    return (
        f"A checkpoint of the true Qwen2-VL {result['shape'].upper()} shape, {result['checkpoint_gb']:.1f} GB of bf16, "
        f"to float16 segments without the check and its golden, each run from a cold page cache until its bytes are on "
        f"the disk (`{result['command']}`; {machine(result)}, a disk of {result['copy']['mb_per_s']} MB/s):\n\n"
        f"{table(names, rows)}"
    )


def fleet(result: dict[str, Any]) -> str:
    """Hours of a batch, and in brackets the share of them for which a GPU works."""
    counts = sorted({row["decoders"] for row in result["rows"]})
    cells = {(row["gpus"], row["decoders"]): f"{row['hours']:.1f} h ({row['busy']:.0%})" for row in result["rows"]}
    measured = result["measured"]
    heading = (
        f"{result['films']} films, {measured['media_s']:.1f} s of a core and {measured['engine_s']:.2f} s of a GPU each"
    )
    rows = [[gpus, *(cells[gpus, count] for count in counts)] for gpus in sorted({gpus for gpus, _ in cells})]
    lines = table(("GPUs", *(f"{count} core{'s' * (count > 1)} for each" for count in counts)), rows)
    return f"{heading}:\n\n{lines}\n\n`{result['command']}`, {machine(result)}"


def accuracy(result: dict[str, Any], stay: Span = STAY) -> str:
    """Reducers by costs, then by types at one cost, then FrameFusion beside each other one."""
    rows = result["accuracy"]
    reducers = list(dict.fromkeys(row["reducer"] for row in rows))
    costs = list(dict.fromkeys(row["cost"] for row in rows))
    by_cost = by_reducer(reducers, costs, rows, "reducer", lambda row: f"{percent(row['accuracy'])} ({bounds(row)})")
    kept = {row["cost"]: row["visual_tokens_left"] for row in rows if row["reducer"] == reducers[0]}
    names = ("", *(f"cost {cost:g}" for cost in costs))
    parts = [
        f"Right answers, in %, of the tiny trained model on {sum(result['questions'].values())} held-out clips of 32 "
        f"frames in which objects are seen for {stay[0]:g} to {stay[1]:g} s, {kept[1.0]:g} visual tokens, with 95 % "
        f"intervals (`{result['command']}`; similarity bound "
        f"{result['similarity_lower_bound']:g}, ratio bound {result['ratio_lower_bound']:g}):\n\n"
        f"{table(names, by_cost)}"
    ]
    types = [
        (f"`{row['reducer']}`", *(f"{percent(share['accuracy'])} ({bounds(share)})" for share in row["types"].values()))
        for row in rows
        if row["cost"] == TYPES_AT or row["reducer"] == "none"
    ]
    kinds = [f"{kind} ({count})" for kind, count in result["questions"].items()]
    parts.append(f"By type of question, at cost {TYPES_AT:g} (`none`: 1):\n\n{table(('', *kinds), types)}")
    others = [name for name in reducers if name not in (reducers[0], "none")]
    compared = by_reducer(
        others, costs[1:], result["paired"], "second", lambda row: f"{100 * row['difference']:+.1f} ({bounds(row)})"
    )
    parts.append(
        f"`{reducers[0]}` less each other reducer on the same questions, in points, with Newcombe's 95 % interval of "
        f"paired differences:\n\n{table(('', *names[2:]), compared)}"
    )
    eager = result["eager"]
    parts.append(
        f"Eager torch, asked dense and at cost 0.3 under `{reducers[0]}`, says something else than the compiled bundle "
        f"to {eager['that_differ']} of {eager['answers']} questions."
    )
    return "\n\n".join(parts)


def by_reducer(
    names: Sequence[str], costs: Sequence[float], rows: Sequence[Any], key: str, cell: Callable[[Any], str]
) -> list[tuple[str, ...]]:
    """A line a reducer, a column a cost; a dash where there is no answer."""
    cells = {(row[key], row["cost"]): cell(row) for row in rows}
    return [(f"`{name}`", *(cells.get((name, cost), "-") for cost in costs)) for name in names]


def bounds(row: dict[str, Any]) -> str:
    """An interval of shares in %; a difference has its signs."""
    low, high = row["interval"]
    if "difference" in row:
        return f"{100 * low:+.1f} to {100 * high:+.1f}"
    return f"{100 * low:.1f}-{100 * high:.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    return f"{facts['cpu']}, {facts['cores']} cores, onnxruntime {facts['onnxruntime']}, torch {facts['torch']}"


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


TABLES: Mapping[str, Callable[[], str]] = {
    "backends": lambda: backends(load("backends")) if (RESULTS / "backends.json").is_file() else NOT_MEASURED,
    "figures": figures,
    "checkpoints": checkpoints,
    "numbers": numbers,
    "families": families,
    "overlap": lambda: film_tables.overlap(load("overlap"), machine(load("overlap"))),
    "overlap-server": lambda: film_tables.overlap(load("overlap_server"), machine(load("overlap_server"))),
    "fleet": lambda: fleet(load("fleet")),
    "serving": serving_or_how,
} | quantized_tables.tables(load)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # it takes none, but for --help
    main()
