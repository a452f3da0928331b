"""The tables of docs/quantisation.md: answers and kept tokens, seconds and bytes, from the results of benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

KINDS = ("merge by threshold", "merge by rank", "prune by rank")


def answers(result: dict[str, Any]) -> str:
    """Right answers by format and cost, then what each format loses."""
    rows = [row for row in result["formats"] if row["bound"] is None and row["reducer"] == "framefusion"]
    costs = list(dict.fromkeys(row["cost"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    cells = {(row["format"], row["cost"]): row for row in rows}
    shares = [(name, *(share(cells[name, cost]) for cost in costs)) for name in formats]
    lost = [(name, *(difference(cells[name, cost]) for cost in costs)) for name in formats[1:]]
    head = ("", *(f"cost {cost:g}" for cost in costs))
    return (
        f"Right answers in %, {result['questions']} questions about {result['clips']} clips, with 95 % intervals "
        f"(`{result['command']}`):\n\n{table(head, shares)}\n\n"
        "Points lost against fp32 on the same questions, with Newcombe's 95 % interval of paired differences; bold "
        f"where it does not reach 0:\n\n{table(head, lost)}"
    )


def calibrated(result: dict[str, Any]) -> str:
    """What codes by films lose beside those of the search, and by what: the answer's beginning, its end, decisions."""
    rows = {(row["format"], row["cost"]): row for row in result["formats"]}
    formats = list(dict.fromkeys(row["format"] for row in result["formats"]))[1:]
    costs = list(dict.fromkeys(row["cost"] for row in result["formats"]))
    lowest = costs[-1]
    floats = rows["float32", lowest]
    questions = result["questions"]
    lines = []
    for name in formats:
        row = rows[name, lowest]
        begins = 100 * (floats["begins_right"] - row["begins_right"]) / questions
        right = round(floats["accuracy"] * questions)
        parts = [100 * (right - row[key]) / questions for key in ("right_by_floats_decisions", "floats_right_by_these")]
        cells = [difference(rows[name, cost]) for cost in costs]
        lines.append((f"`{name}`", *cells, *(f"{value:+.1f}" for value in (begins, *parts)), divergences(result, name)))
    names = (
        "codes", *(f"points lost, cost {cost:g}" for cost in costs), "by beginnings", "by fp32's decisions",
        "fp32 by these decisions", "divergence held out: films, search",
    )  # fmt: skip
    return (
        f"Points lost against fp32, {questions} questions about {result['clips']} clips (`{result['command']}`), with "
        "Newcombe's 95 % interval of paired differences, bold where it does not reach 0. Then, at cost "
        f"{lowest:g}: those lost if an answer is right that begins with what is right, those lost with fp32's "
        "decisions in place of these weights' own, and those that fp32 loses with these weights' decisions. Last, nats "
        f"a token from floats on the prompts held out:\n\n{table(names, lines)}"
    )


def divergences(result: dict[str, Any], name: str) -> str:
    record = result["calibrations"][name]
    if record is None or record["divergence"] is None:
        return "-"
    left = "" if record["taken"] else ", left"
    return f"{record['divergence']:.2g}, {record['search_divergence']:.2g}{left}"


def reference(result: dict[str, Any]) -> str:
    """Codes beside AutoGPTQ's, as a sentence."""
    rows = result["rows"]
    same = sum(row["otherwise"] == 0 for row in rows)
    formats = list(dict.fromkeys(row["format"] for row in rows))

    def more(key: str) -> str:
        shares = [100 * (row[key] / row["error"] - 1) for row in rows]
        return f"{min(shares):.0f} to {max(shares):.0f} % more"

    return (
        f"AutoGPTQ's own `GPTQ.fasterquant` (commit {result['autogptq'][:7]}, act order, static groups) chooses over "
        f"our scales all codes alike in {same} of {len(rows)} cases: four matrices of the tiny model in "
        f"{'; '.join(formats)}. Over its own scales outputs err {more('error_autogptq')} than ours, and our search "
        f"without rows {more('error_search')} (`{result['command']}`)."
    )


def mutations(result: dict[str, Any]) -> str:
    """Changes of one matrix that the golden's limits find of those tried, and that twice the check's limit would."""
    bundles = result["bundles"]
    kinds = list(dict.fromkeys(kind for found in bundles.values() for kind in found))
    rows = [(kind, *(_found(found.get(kind)) for found in bundles.values())) for kind in kinds]
    return table(("change of one matrix", *bundles), rows) + f"\n\n(`{result['command']}`)"


def _found(counts: dict[str, int] | None) -> str:
    return "" if counts is None else f"{counts['found']} of {counts['tried']} ({counts['formerly']})"


def kept(result: dict[str, Any]) -> str:
    """What is kept otherwise than in fp32, which decisions are turned, and what both have to do with right answers."""
    rows = [row for row in result["formats"] if row["format"] != "float32" and row["cost"] < 1]
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    cells = {(row["format"], case_of(row)): row for row in rows}
    head = ("", *map(named, cases))
    agree = [(name, *(f"{100 * cells[name, case]['agree']:.2f}" for case in cases)) for name in formats]
    inside = [case for case in cases if any(cells[name, case]["flips"].keys() - {"merge by rank"} for name in formats)]
    flips = [(name, *(turned(cells[name, case]["flips"]) for case in inside)) for name in formats]
    apart = [(name, *(both(cells[name, case]) for case in inside)) for name in formats]
    deep = result["deep_questions"]
    is_led = any("right_by_floats_decisions" in row for row in rows)
    led = (
        ", then points lost on all of them by these weights with fp32's decisions in place of theirs" if is_led else ""
    )
    return (
        "Visual tokens of fp32's last layer that the last layer holds here, too, in %, mean of the questions (the "
        f"first {deep} where a bound or another reducer is named):\n\n{table(head, agree)}\n\n"
        "Decisions that these scores turn, over the tokens that fp32 had kept at that call: of the tokens that might "
        "go, in %, by threshold / merged by rank / pruned by rank:\n\n"
        f"{table(('', *map(named, inside)), flips)}\n\n"
        f"Questions that keep other tokens than fp32 (and points lost on them), then those that keep the same{led}:\n\n"
        f"{table(('', *map(named, inside)), apart)}"
    )


def families(result: dict[str, Any]) -> str:
    """Tokens kept alike in tiny checkpoints of every family."""
    rows = result["families"]
    cases = list(dict.fromkeys((row["cost"], row["bound"]) for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    names = list(dict.fromkeys(row["family"] for row in rows))
    cells = {(row["family"], row["format"], row["cost"], row["bound"]): row for row in rows}
    head = ("", *formats)
    parts = []
    for cost, bound in cases:
        lines = [
            (f"`{name}`", *(f"{100 * cells[name, form, cost, bound]['agree']:.2f}" for form in formats))
            for name in names
        ]
        parts.append(f"{named(('framefusion', cost, bound))}:\n\n{table(head, lines)}")
    return (
        f"Visual tokens of fp32's last layer that are held here, too, in %: {result['films']} films each "
        f"(`{result['command']}`).\n\n" + "\n\n".join(parts)
    )


def case_of(row: dict[str, Any]) -> tuple[str, float, float | None]:
    return row["reducer"], row["cost"], row["bound"]


def named(case: tuple[str, float, float | None]) -> str:
    reducer, cost, bound = case
    by = "" if reducer == "framefusion" else f"{reducer}, "
    return f"{by}cost {cost:g}" + ("" if bound is None else f", bound {bound:g}")


def share(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def difference(row: dict[str, Any]) -> str:
    pair = row["against_floats"]
    low, high = pair["interval"]
    text = f"{100 * pair['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def turned(flips: dict[str, dict[str, int]]) -> str:
    shares = []
    for kind in KINDS:
        found = flips.get(kind)
        shares.append("-" if found is None else f"{100 * found['tokens_otherwise'] / found['tokens']:.2f}")
    return " / ".join(shares)


def both(row: dict[str, Any]) -> str:
    parts = []
    for name in ("other_kept", "same_kept"):
        facts = row[name]
        count = facts["questions"]
        lost = 100 * (facts["right_in_floats"] - facts["right"]) / max(count, 1)
        parts.append(f"{count} ({lost:+.1f})" if count else "0")
    led = row.get("right_by_floats_decisions")
    if led is not None:
        floats = row["same_kept"]["right_in_floats"] + row["other_kept"]["right_in_floats"]
        parts.append(f"by fp32's decisions {100 * (floats - led) / row['questions']:+.1f}")
    return ", ".join(parts)


def table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def speed(result: dict[str, Any]) -> str:
    """Seconds and bytes of each way to store the weights, those of floats first."""
    rows = []
    for name, weights in result.items():
        if not isinstance(weights, dict) or "bytes_of_fp16" not in weights:
            continue
        dense = weights["ours at cost 1"]
        reduced = weights["ours at cost 0.3"]
        cells = [f"{weights['bytes_of_fp16']:.2f}"]
        for case in (dense, reduced):
            prefill = case["prefill"]["median_s"]
            decode = 1000 * case["decode_per_token"]["median_s"]
            cells.append(f"{prefill:.2f} s ({case['prefill_over_floats']:.2f}x)")
            cells.append(f"{decode:.1f} ms ({case['decode_over_floats']:.2f}x)")
        rows.append((f"`{name}`", *cells, f"{reduced['prefill_over_dense']:.2f}x"))
    names = (
        "", "bytes of fp16", "prefill, cost 1", "decode", "prefill, cost 0.3", "decode, cost 0.3", "cost 0.3 over 1",
    )  # fmt: skip
    heading = (
        f"{result['tokens']} tokens, {result['shape']} shape, {result['threads']} threads, in turn "
        f"(`{result['command']}`), medians of {result['rounds']} rounds, speed-ups over floats in brackets"
    )
    return f"{heading}:\n\n{table(names, rows)}"


def steps(results: Sequence[dict[str, Any]]) -> str:
    """Decode steps by the processor's seconds on one thread, a table for each shape."""
    return "\n\n".join(_steps(result) for result in results)


def _steps(result: dict[str, Any]) -> str:
    contenders = result["contenders"]
    lengths = [name for name in next(iter(contenders.values())) if name.endswith("tokens")]
    rows = []
    for name, contender in contenders.items():
        backend, _, weights = name.partition(":")
        cells = [f"{contender['llm_bytes'] / 1e9:.2f} GB"]
        for at in lengths:
            ratio = f" ({contender[at]['over_first']:.2f}x)" if len(contenders) > 1 else ""
            cells.append(f"{1000 * contender[at]['least_s']:.1f} ms{ratio}")
        rows.append((f"`{weights}`", backend, *cells))
    heading = (
        f"{result['shape']} shape (`{result['command']}`), the processor's seconds of a decode step on one thread, the "
        f"least of {result['rounds']} rounds {'apart' if result.get('apart') else 'in turn'}"
    )
    return f"{heading}:\n\n{table(('weights', 'backend', 'LLM', *(f'behind {at}' for at in lengths)), rows)}"


def memory(result: dict[str, Any]) -> str:
    """What a large bundle of each format took when it was built and answered alone."""
    formats: dict[str, dict[str, Any]] = result["formats"]
    bytes_of = {
        "weights of the LLM's files": "llm_bytes",
        "peak of building, one process": "build_peak_bytes",
        "of it no file's pages": "build_own_bytes",
        "opened": "opened_bytes",
        "peak of answering": "run_peak_bytes",
        "of it no file's pages, at most": "run_own_bytes",
        "of these the benchmark's imports": "imports_own_bytes",
    }
    rows = [(name, *(f"{found[key] / 1e9:.2f} GB" for found in formats.values())) for name, key in bytes_of.items()]
    reduced = [found["ours at cost 0.3"] for found in formats.values()]
    tokens = next(iter(formats.values()))["tokens"]
    rows += [
        ("forecast of answering, without them", *(f"{run['planned_bytes'] / 1e9:.2f} GB" for run in reduced)),
        (f"prefill of {tokens} tokens at cost 0.3", *(f"{run['prefill']['median_s']:.0f} s" for run in reduced)),
        ("tokens a second behind it", *(f"{run['tokens_per_second']:.2f}" for run in reduced)),
    ]
    limit = f", {result['limit_gb']:g} GB allowed to a build (RLIMIT_DATA)" if result["limit_gb"] else ""
    load = result["machine"]["load_before"]
    heading = f"{result['shape']} shape (`{result['command']}`), with a load of {load} beside it{limit}"
    return f"{heading}:\n\n{table(('', *(f'`{weights}`' for weights in formats)), rows)}"


def int8_linear(result: dict[str, Any]) -> str:
    """Seconds of one linear map of each form, by rows."""
    forms = result["forms"]
    lengths = list(next(iter(forms.values())))
    floats = next(iter(forms.values()))
    rows = []
    for name, form in forms.items():
        cells = [
            f"{1000 * form[at]['least_s']:.2f} ms ({floats[at]['least_s'] / form[at]['least_s']:.2f}x)"
            for at in lengths
        ]
        rows.append((name, *cells, f"{100 * form[lengths[-1]]['error']:.1f} %"))
    return table(("weights", *lengths, "error"), rows)


def tables(load: Callable[[str], dict[str, Any]]) -> dict[str, Callable[[], str]]:
    """The tables of the page by their names there.

    Args:
        load: reads the results of a benchmark; raises FileNotFoundError where it was not run.
    """

    def of_shapes(name: str, processor: str = "") -> list[dict[str, Any]]:
        """The results at each shape that a benchmark was run at, the smallest first."""
        found = []
        for file in (f"{name}{processor}", f"{name}_qwen2-1.5b{processor}", f"{name}_qwen2-7b{processor}"):
            with suppress(FileNotFoundError):
                found.append(load(file))
        return found

    return {
        "caches in int8": lambda: caches(load("kv_cache")),
        "quantised memory": lambda: memory(load("quantised_alone_qwen2-7b")),
        "quantised answers": lambda: answers(load("quantized_accuracy")),
        "calibrated answers": lambda: calibrated(load("quantized_films")),
        "calibrated answers, brief": lambda: calibrated(load("quantized_films_brief")),
        "gptq reference": lambda: reference(load("gptq_reference")),
        "golden mutations": lambda: mutations(load("golden_mutations")),
        "quantised heads": lambda: answers(load("quantized_heads")),
        "floats of 8 bits": lambda: answers(load("quantized_float8")),
        "quantised families": lambda: families(load("quantized_families")),
        "quantised reduction": lambda: kept(load("quantized_accuracy")),
        "quantised speed": lambda: "\n\n".join(map(speed, of_shapes("quantised"))),
        "quantised speed, no dot products": lambda: "\n\n".join(map(speed, of_shapes("quantised", "_no-dot-products"))),
        "quantised steps": lambda: steps(of_shapes("quantised_steps")),
        "int8 linear": lambda: int8_linear(load("int8_linear")),
    }


def caches(result: dict[str, Any]) -> str:
    """KV caches in floats and in int8: bytes, time where it was measured, error, answers."""
    errors = result["errors"]
    behind = f"behind_{errors['tokens']}_tokens"
    far = []
    for cost in (key for key in errors if key.startswith("cost ")):
        facts = errors[cost]
        cells = [
            f"{100 * facts[key]['median']:.2g} % ({100 * facts[key]['largest']:.2g} %)"
            for key in ("behind_the_prompt", behind)
        ]
        far.append((cost, *cells, f"{100 * facts['same_likeliest']:.1f} %", facts["kept_otherwise"]))
    last = f"behind {errors['tokens']} tokens"
    names = ("", "logits behind the prompt", last, "same likeliest token", "tokens kept otherwise")
    return (
        f"{cache_speed(result)}\n\nErrors relative to the largest logit, over {errors['films']} films of the tiny "
        f"trained model, median and largest:\n\n{table(names, far)}\n\n{answers(result)}"
    )


def cache_speed(result: dict[str, Any]) -> str:
    """Bytes of a token, and prefill and decode in turn; bytes alone where no rounds were run."""
    if "speed" not in result:
        sizes = [(f"`{name}`", f"{facts['bytes_per_token'] / 1000:.2f} kB") for name, facts in result["caches"].items()]
        return (
            "Bytes of a token in all layers of the tiny trained model; seconds were not measured in that run, as they "
            f"are with more `--rounds` (`{result['command']}`):\n\n{table(('', 'bytes of a token'), sizes)}"
        )
    speed = result["speed"]
    costs = [key for key in speed["int8"] if key.startswith("ours at cost ")]
    rows = []
    for name in ("float32", "int8"):
        cells = [f"{speed[name]['bytes_per_token'] / 1000:.2f} kB"]
        for cost in costs:
            for stage, unit, factor in (("prefill", "s", 1), ("decode_per_token", "ms", 1000)):
                seconds = speed[name][cost][stage]["median_s"]
                ratio = speed["float32"][cost][stage]["median_s"] / seconds
                cells.append(f"{factor * seconds:.3g} {unit} ({ratio:.2f}x)")
        rows.append((f"`{name}`", *cells))
    names = ["", "bytes of a token"]
    for label in (cost.removeprefix("ours at ") for cost in costs):
        names += [f"prefill, {label}", f"decode, {label}"]
    return (
        f"{speed['tokens']} tokens, {speed['shape']} shape in float32, {speed['threads']} threads, in turn "
        f"(`{result['command']}`), medians of {speed['rounds']} rounds, speed-ups over float32 in "
        f"brackets:\n\n{table(names, rows)}"
    )
