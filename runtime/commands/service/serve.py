"""`ff-run serve`: the flags of a server, and what they make. Needs the extra `server`; knows no protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from framefusion.console import messages as console
from framefusion.console.help import Command, option
from framefusion.errors import BackendError, ServerError
from framefusion.installation import install_command
from framefusion.runtime.commands.flags import (
    COST,
    COUNT,
    FILE,
    FPS,
    MAX_FRAMES,
    REDUCER,
    open_pipeline,
    running_flags,
    running_options,
)
from framefusion.runtime.machine.cpu import available_cores

if TYPE_CHECKING:
    from framefusion.runtime.pipeline import Pipeline

MEGABYTE = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@click.command(cls=Command, examples=("ff-run serve bundle --port 8000", "curl http://127.0.0.1:8000/v1/models"))
@click.argument("bundle", type=FILE)
@option(
    "--host",
    section="The server",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 is all of them.",
)
@option(
    "--port",
    section="The server",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@option(
    "--model-name", section="The server", help="Name under which the bundle answers; default: the name of its folder."
)
@option(
    "--api-key",
    section="The server",
    envvar="FRAMEFUSION_API_KEY",
    show_envvar=True,
    help="Key that every request must carry, best given in the environment, since others can see flags; default: none.",
)
@option(
    "--allowed-hosts",
    section="The server",
    help="Names under which clients address the server, with commas between; default: this machine's own, and --host.",
)
@option(
    "--allowed-media-domains",
    section="What clients may show",
    default="",
    help="Hosts that films and pictures are fetched from, with commas between, or any; default: none.",
)
@option(
    "--allowed-local-media-path",
    section="What clients may show",
    type=FILE,
    help="Folder below which file:// addresses are opened; default: none.",
)
@option(
    "--max-media-mb",
    section="What clients may show",
    type=COUNT,
    default=256,
    show_default=True,
    help="Largest films and pictures of one request together, in megabytes.",
)
@option(
    "--max-waiting",
    section="Load",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    help="Most requests that wait; others get a 429.",
)
@option(
    "--max-running",
    section="Load",
    type=COUNT,
    default=8,
    show_default=True,
    help="Most requests that are decoded at once.",
)
@option(
    "--cache-mb",
    section="Load",
    type=COUNT,
    default=2048,
    show_default=True,
    help="Megabytes for keys and values, those of conversations too.",
)
@option(
    "--request-seconds",
    section="Load",
    type=click.IntRange(1),
    default=600,
    show_default=True,
    help="Most seconds for one request.",
)
@option(
    "--images-as-video",
    section="What clients may show",
    is_flag=True,
    help="Take pictures that follow each other for the frames of a film.",
)
@COST
@REDUCER
@FPS
@MAX_FRAMES
@option(
    "--metrics-prefix",
    section="The server",
    default="framefusion:",
    show_default=True,
    help="Beginning of the names under /metrics; that of vLLM is vllm:.",
)
@running_options
def serve(bundle: Path, **flags: Any) -> None:
    """Answer requests over HTTP with BUNDLE, as OpenAI's chat completions.

    Nothing but the content of requests is opened unless a flag allows it, and only this machine can connect. What a
    request does not say of its reduction and its frames is as the flags have it.
    """
    # 1. What is missing or wrong is said before a bundle is opened.
    from framefusion.runtime.generation.prefill import check_reduction
    from framefusion.runtime.request import Request

    try:
        from framefusion.runtime.server import running
        from framefusion.runtime.server.media.decoding import start_decoders
    except ModuleNotFoundError as error:
        raise BackendError(f"a server needs {error.name}: {install_command('server')}") from error
    running_settings = running_flags(flags)
    address = running.Address(flags["host"], flags["port"])
    name = flags["model_name"] or bundle.resolve().name
    policy = _policy(flags)
    opened = running.listen(address)
    # 2. Children that decode are copies of a process without threads and connections: it begins first.
    start_decoders()
    # 3. The bundle, and what answers with it.
    pipeline = open_pipeline(bundle, **running_settings)
    check_reduction(pipeline.manifest, Request(cost=flags["cost"], reducer=flags["reducer"]))
    service = _service(pipeline, name, policy, flags)
    host, port = opened.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if pipeline.choice is not None:
        console.log(pipeline.choice.text)
    console.log(f"{name} answers at http://{shown}:{port}/v1 (Ctrl-C ends it)")
    running.run(service, _access(flags, host, policy), opened)


def _policy(flags: dict[str, Any]) -> Any:
    """What clients may show."""
    from framefusion.runtime.server.media.policy import MediaPolicy, read_domains

    domains = read_domains(flags["allowed_media_domains"])
    return MediaPolicy(domains, flags["allowed_local_media_path"], flags["max_media_mb"] * MEGABYTE)


def _access(flags: dict[str, Any], host: str, policy: Any) -> Any:
    """Who may ask."""
    from framefusion.runtime.server.app import Access

    given = flags["allowed_hosts"]
    hosts = [name.strip() for name in given.split(",") if name.strip()] if given else [*LOOPBACK, flags["host"]]
    if not given and host in ("0.0.0.0", "::"):
        hosts = ["*"]  # every address of this machine: its names cannot be known
    key = flags["api_key"]
    if key is not None and not key.strip():
        raise ServerError("the API key is empty: give one, or leave it out")
    return Access(hosts, key, policy.body_bytes)


def _service(pipeline: Pipeline, name: str, policy: Any, flags: dict[str, Any]) -> Any:
    """What answers."""
    from framefusion.runtime.server.media.reader import MediaReader
    from framefusion.runtime.server.protocol.request import ReductionDefaults
    from framefusion.runtime.server.service import Service, ServiceSettings

    reader = MediaReader(
        policy,
        pipeline.manifest.preprocessing,
        pipeline.manifest.sampling.overridden(flags["fps"], flags["max_frames"]),
        decoders=max(available_cores() // 2, 1),
    )
    settings = ServiceSettings(
        name,
        max_waiting=flags["max_waiting"],
        max_running=flags["max_running"],
        cache_budget=flags["cache_mb"] * MEGABYTE,
        request_seconds=float(flags["request_seconds"]),
        reduction=ReductionDefaults(flags["cost"], flags["reducer"], flags["images_as_video"]),
        metrics_prefix=flags["metrics_prefix"],
    )
    return Service(pipeline, reader, settings)
