"""What a client gets: a completion, its pieces, and errors, in OpenAI's shape.

`usage` counts as OpenAI does, and says beside it how many visual tokens were shown and how many the last layer keeps:
its `prompt_tokens` are those of the prompt as it was written, whatever became of them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from framefusion.errors import FrameFusionError, RequestError
from framefusion.runtime.request import PrefillReport

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass
class Answer:
    """The facts about one answer that its messages repeat.

    Attributes:
        model: its name.
        warnings: about what was shown.
        identity: of the completion.
        created: in seconds since 1970.
    """

    model: str
    warnings: Sequence[str] = ()
    identity: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self,
        text: str,
        reason: str,
        usage: Mapping[str, Any],
        seconds: Mapping[str, float],
        drawing: str | None = None,
    ) -> dict[str, Any]:
        """The whole answer at once, with a drawing of what stays where one is wanted."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion") | {
            "choices": [choice],
            "usage": usage,
            "framefusion": self._facts(seconds, drawing),
        }

    def piece(self, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def counts(
        self, usage: Mapping[str, Any], seconds: Mapping[str, float], drawing: str | None = None
    ) -> dict[str, Any]:
        """The last piece of a stream whose client wants the counts."""
        head = self._head("chat.completion.chunk")
        return head | {"choices": [], "usage": usage, "framefusion": self._facts(seconds, drawing)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _facts(self, seconds: Mapping[str, float], drawing: str | None) -> dict[str, Any]:
        facts: dict[str, Any] = {"seconds": dict(seconds), "warnings": list(self.warnings)}
        return facts if drawing is None else facts | {"html": drawing}


def usage_of(report: PrefillReport, new_tokens: int) -> dict[str, Any]:
    """Counts of tokens: of the prompt and the answer, and what became of the visual ones.

    `kept_tokens` are the visual tokens that the last layer holds, `cost` is the share of the computation over visual
    tokens that was kept; both count the whole conversation.
    """
    details = {
        "cached_tokens": report.reused_tokens,
        "visual_tokens": report.visual_tokens,
        "kept_tokens": report.kept_tokens,
        "cost": round(report.cost, 4),
    }
    return {
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": report.prompt_tokens + new_tokens,
        "prompt_tokens_details": details,
    }


def status_of(error: BaseException) -> int:
    """The HTTP status of an error: whose fault it is."""
    if isinstance(error, RequestError):
        return error.status
    return 400 if isinstance(error, FrameFusionError) and error.sender_fault else 500


def error_body(error: BaseException) -> dict[str, Any]:
    """An error in OpenAI's shape; `code` is the name that docs/errors.md lists. A bug says nothing of the server."""
    status = status_of(error)
    known = isinstance(error, FrameFusionError)
    message = "the server could not answer: its log says why"
    if isinstance(error, FrameFusionError) and error.sender_fault:
        message = str(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = error.param if isinstance(error, RequestError) else None
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": type(error).__name__ if known else "InternalError",
        }
    }
