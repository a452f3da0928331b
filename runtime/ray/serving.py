"""The server of docs/server.md as a deployment of Ray Serve: as many replicas as there is load, behind Ray's proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.server.media.policy import MediaPolicy


def server_deployment(
    bundle: str,
    *,
    model: str | None = None,
    policy: MediaPolicy | None = None,
    api_key: str | None = None,
    max_running: int = 8,
    max_waiting: int = 16,
    cache_budget: int = 2 << 30,
    threads: int = 0,
    **options: Any,
) -> Any:
    """An application for `ray.serve.run`, whose replicas answer as `ff-run serve` does.

    A conversation's caches are in one replica: a turn that another one gets is prefilled whole, and answered alike.

    Args:
        bundle: its folder, on every node.
        model: name of the bundle; None takes its folder's.
        policy: what clients may show; None opens nothing.
        api_key: that requests carry; None asks for none.
        max_running, max_waiting, cache_budget: of one replica; see `ServiceSettings`.
        threads: of one operator on the CPU; 0 takes the physical cores it has.
        options: of `ray.serve.deployment`: num_replicas, ray_actor_options, autoscaling_config.

    Raises:
        BackendError: Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise BackendError(f"a deployment needs Ray Serve ({error}): {install_command('ray')}") from error
    from framefusion.runtime.server.app import Access, create_app
    from framefusion.runtime.server.media.decoding import start_decoders
    from framefusion.runtime.server.media.reader import MediaReader
    from framefusion.runtime.server.service import Service, ServiceSettings

    def build() -> Any:
        """The application of one replica."""
        start_decoders()
        pipeline = Pipeline(bundle, threads=threads)
        manifest = pipeline.manifest
        allowed = policy or MediaPolicy()
        reader = MediaReader(allowed, manifest.preprocessing, manifest.sampling)
        settings = ServiceSettings(
            model or Path(bundle).name, max_waiting=max_waiting, max_running=max_running, cache_budget=cache_budget
        )
        access = Access(("*",), api_key, allowed.body_bytes)
        return create_app(Service(pipeline, reader, settings), access)

    @serve.deployment(**{"name": "framefusion", **options})
    @serve.ingress(build)
    class Server:
        """One replica; all it does is in the application."""

    return Server.bind()  # type: ignore[attr-defined]  # Ray's decorator made a deployment of the class
