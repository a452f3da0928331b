"""Errors a user can cause, one class per kind, each with the exit code the commands return for it.

Every message names what is wrong, the value and the limit, and what to do. Anything else that escapes is a bug in
FrameFusion-AOT and keeps its traceback. Exit code 1 is left to such bugs, 2 to the command line parser.
"""

from __future__ import annotations


class FrameFusionError(Exception):
    """Base of all errors that a user can cause and mend.

    Attributes:
        exit_code: what a command returns.
        sender_fault: whoever sent a request can mend it, by sending another: a server answers it with a status of 4xx
            and goes on. Else whoever runs the server has to: 5xx.
    """

    exit_code = 3
    sender_fault: bool = False


class BudgetError(FrameFusionError):
    """A cost, threshold or schedule that is out of range or cannot be reached by this model and depth."""

    exit_code = 10
    sender_fault = True


class VideoError(FrameFusionError):
    """A video that is missing, unreadable, empty, truncated or too short for the sampling that is requested."""

    exit_code = 11
    sender_fault = True


class PromptError(FrameFusionError):
    """A prompt that does not fit the bundle: too long, or with placeholders that match no video."""

    exit_code = 12
    sender_fault = True


class BundleError(FrameFusionError):
    """A bundle with a missing, truncated, altered or too new part, or one that no build writes."""

    exit_code = 13


class CheckpointError(FrameFusionError):
    """A checkpoint with a missing or unexpected tensor, file or configuration value."""

    exit_code = 14


class UnknownFamilyError(CheckpointError):
    """A `model_type` that no family declares."""

    exit_code = 15


class StorageError(FrameFusionError):
    """A disk that is full, or a place that cannot be written, or must not: it holds what is not ours."""

    exit_code = 16


class CheckFailedError(FrameFusionError):
    """A bundle that does not reproduce the eager model within its tolerance."""

    exit_code = 17


class BackendError(FrameFusionError):
    """A package or device that a backend needs and this machine lacks, or an engine that refuses its inputs."""

    exit_code = 18


class ReducerError(FrameFusionError):
    """A reducer that is unknown or broken, that does not fit the bundle, or that did not keep what it declared."""

    exit_code = 19
    sender_fault = True


class TrustError(FrameFusionError):
    """A bundle that no trusted key signed, or engines that nobody vouches for."""

    exit_code = 20


class EvaluationError(FrameFusionError):
    """A file of questions with a missing or malformed part, or earlier answers that belong to another evaluation."""

    exit_code = 21


class ClosedError(FrameFusionError):
    """A pipeline that was closed, and had freed what a request needs."""

    exit_code = 22


class ServerError(FrameFusionError):
    """A server that cannot start: its address is taken, or a setting of it contradicts another."""

    exit_code = 23


class RequestError(FrameFusionError):
    """A request to a server that is malformed, or asks for what this server does not allow.

    Args:
        message: what is wrong, and what to do.
        param: the field that is wrong, as messages[0].content.
        status: of the HTTP answer.
    """

    exit_code = 24
    sender_fault = True

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class CompilerCrashError(BackendError):
    """A library that crashed while it compiled an engine. It ran in a process of its own, so nothing else ended."""

    exit_code = 25


class InterruptedBuildError(FrameFusionError):
    """Ctrl-C during a build: what is complete stays and the next build resumes from it."""

    exit_code = 130


class MediaWarning(UserWarning):
    """A film or picture is shown, but not all of it. No error: the commands print it and go on."""
