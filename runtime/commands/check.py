"""`ff-run check`: is the backend that would answer right on this device? The bundle's golden says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command
from framefusion.console.terminal import PATIENCE, activity
from framefusion.errors import CheckFailedError
from framefusion.runtime.commands.flags import FILE, backend_options


@click.command(cls=Command, examples=("ff-run check bundle", "ff-run check bundle --backend onnxruntime --json"))
@click.argument("bundle", type=FILE)
@backend_options
@console.json_option
@click.pass_context
def check(
    ctx: click.Context,
    bundle: Path,
    threads: int,
    backend: str,
    device: str,
    no_verify: bool,
    trusted_keys: Path | None,
    trust_engines: bool,
) -> None:
    """Say whether the backend that would be chosen here computes BUNDLE right, number by number.

    It runs the bundle's golden, a small request whose right answers the bundle carries: those of the eager model in
    fp32. What is found is remembered for this bundle, device, driver and library, and the next answer goes by it.
    """
    from framefusion.runtime.bundle import Bundle
    from framefusion.runtime.proof.opening import check_backend
    from framefusion.runtime.proof.prove import facts_of
    from framefusion.runtime.trust.origin import Trust

    name, place = (None if flag == "auto" else flag for flag in (backend, device))
    with activity("running the golden's request", after=PATIENCE):
        opened = Bundle(bundle, verify=not no_verify, trust=Trust.of(trusted_keys, trust_engines))
        option, proof = check_backend(opened, name, place, threads=threads)
    report = {"bundle": str(bundle), "backend": option.backend, "device": option.device, "name": option.text}
    console.show(report | dict(facts_of(proof)), _render)
    if not proof.right:
        console.log(
            f"error: {option.text} on this device: {proof.text}; take another --backend or its library's version"
        )
        ctx.exit(CheckFailedError.exit_code)


def _render(report: dict[str, Any]) -> str:
    rows = [
        (stage["what"], f"{stage['error']:.1e}", f"{stage['limit']:.1e}", "right" if stage["right"] else "WRONG")
        for stage in report["stages"]
    ]
    notes = [f"{stage['what']}: {stage['note']}" for stage in report["stages"] if stage["note"]]
    verdict = f"{report['name']} on this device: {report['text']}, {report['seconds']:.1f} s"
    return "\n".join([console.table(("compared with the golden", "error", "limit", ""), rows), *notes, verdict])
