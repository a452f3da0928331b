"""`ff-run doctor`: what this machine has, what is missing, and whether what is there computes right."""

from __future__ import annotations

import shutil
from typing import Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command, option
from framefusion.console.layout import counted, prose
from framefusion.console.terminal import PATIENCE, activity
from framefusion.errors import CheckFailedError

_STATES = {"right": "ready", "absent": "no GPU", "unproven": "loads", "wrong": "WRONG", "failed": "FAILED"}
_MENDED = ("missing", "wrong", "failed")


@click.command(cls=Command, examples=("ff-run doctor", "ff-run doctor --json", "ff-run doctor --engines"))
@option(
    "--engines", is_flag=True, help="Compile small engines, too, where torch or a builder is there, and prove them."
)
@console.json_option
@click.pass_context
def doctor(ctx: click.Context, engines: bool) -> None:
    """Say what this machine has for running bundles, what is missing, and whether what is there computes right.

    Needs no bundle. Each backend runs attention over a cache, norm, rotary, scores, and products of weights in 4 and 8
    bits, each device moves, adds up and reduces rows, and numpy says what is right. Engines are compiled with --engines
    alone, which takes a minute. Exit code 17 where something that is installed is wrong or fails.
    """
    from framefusion.runtime.proof.doctor import examine

    with activity("proving what is installed", after=PATIENCE):
        report = examine(engines=engines)
    console.show(report, _render)
    if not report["right"]:
        broken = [proof["name"] for proof in report["proofs"] if proof["state"] in ("wrong", "failed")]
        console.log(f"error: {', '.join(broken) or 'the base install'} cannot be relied on here; see above")
        ctx.exit(CheckFailedError.exit_code)


def _render(report: dict[str, Any]) -> str:
    gpu = report["gpu"]
    card = "none that a driver shows"
    if gpu:
        card = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory'] / 1e9:.0f} GB, driver for CUDA "
        card += ".".join(map(str, gpu["cuda"]))
    installed = ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version)
    facts = {
        "framefusion-aot": f"{report['framefusion']}, Python {report['python']}, {report['system']}",
        "CPU": _processor(report["cpu"]),
        "GPU": card,
        "installed": installed,
    }
    proofs = report["proofs"]
    states = {proof["name"]: f"{_STATES.get(proof['state'], proof['state'])}: {_detail(proof)}" for proof in proofs}
    columns = shutil.get_terminal_size().columns
    remedies = {proof["name"]: proof["remedy"] for proof in proofs if proof["state"] in _MENDED}
    mending = [prose(f"to mend {name}: {remedy}", columns) for name, remedy in remedies.items()]
    return "\n\n".join([console.labelled(facts), console.labelled(states), *mending])


def _processor(facts: dict[str, Any]) -> str:
    instructions = f" with {', '.join(facts['instructions'])}" if facts["instructions"] else ""
    return f"{facts['name'] or 'unknown'}, {counted(facts['cores'], 'core')}{instructions}"


def _detail(proof: dict[str, Any]) -> str:
    if proof["state"] != "right":
        return str(proof["problem"])
    proven = [graph for graph in proof["graphs"] if graph["state"] == "right"]
    number = sum(len(graph["checks"]) for graph in proven)
    text = f"{number} comparisons with numpy ({_names(proven)})"
    others = [graph for graph in proof["graphs"] if graph["state"] != "right"]
    return text + (f"; not there: {_names(others)}" if others else "")


def _names(graphs: list[dict[str, Any]]) -> str:
    """Dialects, types, and what weights are in: "gqa float32 in floats, int8 and int4"; floats alone are not said."""
    found: dict[str, list[str]] = {}
    for graph in graphs:
        found.setdefault(f"{graph['dialect']} {graph['dtype']}".strip(), []).append(graph["weights"])
    names = []
    for kind, kinds in found.items():
        in_all = " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
        names.append(kind if kinds == ["floats"] else f"{kind} in {in_all}")
    return ", ".join(names)
