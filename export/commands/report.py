"""The commands that say what there is: `inspect` a bundle, list the `families`. Neither needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command, option
from framefusion.export.commands.flags import COUNT, FOLDER


@click.command(name="inspect", cls=Command, examples=("ff-export inspect bundle --input-len 4096 --cost 0.3",))
@click.argument("bundle", type=FOLDER)
@option("--input-len", type=COUNT, help="Tokens of the prompt that memory is counted for; default: the longest.")
@option("--visual-len", type=click.IntRange(min=0), help="Visual tokens among them; default: all but 64.")
@option("--max-new-tokens", "-n", type=COUNT, default=128, show_default=True, help="Longest answer, in tokens.")
@option("--cost", type=float, help="Kept share that expected lengths are counted for; default: the bundle's.")
@console.json_option
def inspect_command(bundle: Path, **prompt_size: Any) -> None:
    """Say what is in BUNDLE and what memory it takes."""
    from framefusion.export.report.inspection import PromptSize, render, report

    console.show(report(bundle, PromptSize(**prompt_size)), render)


@click.command(name="families", cls=Command, examples=("ff-export families",))
@console.json_option
def families_command() -> None:
    """List the model families, and what each was verified against."""
    from framefusion.export.families import FAMILIES, installed_families

    names = (
        *("name", "architectures", "llm_architectures", "model_types"),
        *("checkpoints", "verified", "reference", "stand_in"),
    )
    rows = [{name: getattr(family, name) for name in names} for family in (*FAMILIES, *installed_families())]
    console.show({"families": rows}, _render_families)


def _render_families(report: dict[str, Any]) -> str:
    blocks = ["A checkpoint belongs to the family that its config.json names by architecture."]
    for row in report["families"]:
        within = f" with {' or '.join(row['llm_architectures'])} within" if row["llm_architectures"] else ""
        facts = {
            "family": row["name"],
            "architecture": ", ".join(row["architectures"]) + within,
            "declared for": ", ".join(row["checkpoints"]),
            "verified against": row["verified"],
            "a build compares": f"with {row['reference'] or 'eager torch alone'}",
            "not by transformers": row["stand_in"] or "nothing",
        }
        blocks.append(console.labelled(facts))
    return "\n\n".join(blocks)
