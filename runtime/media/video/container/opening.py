"""A video file opened with PyAV: the demuxers that may read it, the track that a player shows, its packets.

Decodes nothing. PyAV is imported on first use; what FFmpeg reports becomes a VideoError that names the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from framefusion.errors import VideoError
from framefusion.runtime.machine.cpu import available_cores
from framefusion.runtime.media.video.animation import still_format
from framefusion.runtime.media.video.container.ending import Ending

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# Demuxers that may read a user's file. None of them opens another file or an address, runs a script, or takes text for
# a picture: playlists (hls, dash, concat, sdp), numbered pictures (image2) and devices are not among them.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,kux,asf,asf_o,ogg,nut,gif,apng,mxf,gxf,"
    "rm,wtv,dv,ivf,h264,hevc,vvc,av1,obu,m4v,h263,h261,vc1,cavsvideo,avs2,avs3,dirac,mjpeg,yuv4mpegpipe,swf,dhav,nsv,"
    "nuv,pva,ty,amv,flic,roq,smk,bink,jpegxl_anim,mp3,aac,flac,wav,aiff,caf,ape,tak,tta,wv,ac3,eac3,dts,amr"
)
MOST_THREADS = 16  # of FFmpeg's own number
THREADS_WITHIN_A_LIMIT = 4
"""Of a decoder where the address space is limited, as in a child of the server's: each takes up to 136 MiB of it for
its stack and its heap, and with FFmpeg's one a core there is no room for a film from 14 cores on."""

_is_ended: ContextVar[Callable[[], bool]] = ContextVar("is_ended", default=lambda: False)


@contextmanager
def ended_by(is_ended: Callable[[], bool]) -> Iterator[None]:
    """Films that are read within, in this thread, end with an error between two frames once `is_ended` says so."""
    token = _is_ended.set(is_ended)
    try:
        yield
    finally:
        _is_ended.reset(token)


@contextmanager
def open_video(source: Path) -> Iterator[InputContainer]:
    """A PyAV container that has a moving picture.

    Raises:
        VideoError: an image, no film, a codec that is unknown, or what FFmpeg reports while the container is open.
    """
    import av

    if still := still_format(source):
        raise VideoError(f"{source} is an image ({still}): pass it as an image")
    # An absolute path behind "file:" is a path for FFmpeg, whatever colons its name has.
    address = f"file:{source.absolute()}"
    # Given as `options`, PyAV 14 writes them past the tracks of a container that finds its tracks late (FLV).
    options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
    try:
        with av.open(address, container_options=options, **_lenient(av)) as container:
            _check_kind(source, container)
            _share_work(film(container))
            yield container
    except av.BlockingIOError as error:
        raise VideoError(
            f"{source} cannot be decoded ({_reason(error)}): where other films cannot either, raise this process's "
            "limits of threads and of memory (ulimit -u, ulimit -v); else it is damaged, download it again"
        ) from error
    except (av.FFmpegError, IndexError) as error:
        lost = Ending.of_mp4(source).reason
        reason = f"is truncated ({lost})" if lost else f"is damaged or no video ({_reason(error)})"
        if isinstance(error, av.EOFError) and not lost:
            reason = "has no frame (it ends before the first)"
        raise VideoError(f"{source} {reason}: copy or download it again, or convert it with ffmpeg") from error


def _share_work(track: VideoStream) -> None:
    """Let FFmpeg decode with a thread a core, or with few where they would take the room of the film.

    By itself it counts the cores that it may run on, whatever a container's quota pays for.
    """
    track.thread_type = "AUTO"
    cores = available_cores()
    if _has_limited_addresses():
        track.codec_context.thread_count = min(cores, THREADS_WITHIN_A_LIMIT)
    elif cores < (os.cpu_count() or 1):
        track.codec_context.thread_count = min(cores, MOST_THREADS)


def _has_limited_addresses() -> bool:
    try:
        import resource
    except ImportError:  # Windows limits no address space
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _reason(error: Exception) -> str:
    """FFmpeg's message without the address."""
    return str(getattr(error, "strerror", "") or error)


def _check_kind(source: Path, container: InputContainer) -> None:
    """FFmpeg opens stills as films of one frame, and the cover of a song as a film: refuse them."""
    track = _film_or_none(container)
    if track is None:
        held = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        if container.streams.video:
            held += ", none of it moving"
        raise VideoError(f"{source} has no video track (it holds {held}): give a file with a moving picture")
    if track.codec_context is None:
        raise VideoError(f"{source} has a video track in an unknown codec: convert it with ffmpeg to H.264")


def check_deadline(source: Path, deadline: float) -> None:
    """Refuse a film that takes longer to read than allowed, or that nobody waits for any more.

    Raises:
        VideoError: time.monotonic() is past `deadline`, or `ended_by` says so.
    """
    if _is_ended.get()():
        raise VideoError(f"{source} is not wanted any more")
    if time.monotonic() > deadline:
        raise VideoError(
            f"{source} takes longer to read than its limit allows: cut it or scale it down, or raise --max-film-seconds"
        )


def packets(container: InputContainer, stream: VideoStream | None = None) -> Iterator[Packet[Any]]:
    """The packets that have content, of one track or all, up to where the container ends or breaks off."""
    import av

    demuxer: Iterator[Packet[Any]] = container.demux() if stream is None else container.demux(stream)
    while True:
        try:
            packet = next(demuxer, None)
        except (av.FFmpegError, IndexError):  # IndexError: PyAV's, when damage makes up a new track
            return  # as a player: what lies behind is lost
        if packet is None:
            return
        if packet.size:
            yield packet


def film(container: InputContainer) -> VideoStream:
    """The track that a player shows, of a container that `open_video` gave."""
    track = _film_or_none(container)
    assert track is not None  # else it was not opened
    return track


def _film_or_none(container: InputContainer) -> VideoStream | None:
    """The default track, else the first; no cover of a song, no still beside a film."""
    if not container.streams.video:
        return None
    kinds = type(container.streams.video[0].disposition)
    aside = kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image | kinds.dependent
    tracks = [track for track in container.streams.video if not track.disposition & aside]
    if "avif" in container.metadata.get("major_brand", "") + container.metadata.get("compatible_brands", ""):
        tracks.sort(key=lambda track: track.frames < 2)  # a still picture stands before the film, undeclared
    default = next((track for track in tracks if track.disposition & kinds.default), None)
    return default or next(iter(tracks), None)


def _lenient(av: ModuleType) -> dict[str, Any]:
    """What makes PyAV pass over metadata that is not UTF-8: since 19 it does so by itself."""
    return {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
