"""A bundle as a model of Triton's Python backend: each request streams the pieces of its answer.

Films and pictures come as the bytes of their files, and are decoded in this process: put a limit on who may ask.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from framefusion import Pipeline, Request
from framefusion.errors import FrameFusionError


class TritonPythonModel:
    """What Triton calls: once to begin, for requests as they come, once to end."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle that config.pbtxt names."""
        parameters = json.loads(args["model_config"])["parameters"]
        self.pipeline = Pipeline(parameters["bundle"]["string_value"])

    def execute(self, requests: list[Any]) -> None:
        """Answer one request after the other; a decoupled model returns nothing here."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                for step in self.pipeline.stream(*self._question(request)):
                    if step.text:
                        text = pb_utils.Tensor("TEXT", np.array([step.text.encode()], np.object_))
                        sender.send(pb_utils.InferenceResponse([text]))
            except FrameFusionError as error:
                problem = pb_utils.TritonError(f"{type(error).__name__}: {error}")
                sender.send(pb_utils.InferenceResponse(error=problem))
            finally:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Free the bundle."""
        self.pipeline.close()

    def _question(self, request: Any) -> tuple[str, list[bytes], Request]:
        """Prompt, contents of films and pictures, and how they are answered."""
        given = {
            name: tensor.as_numpy().ravel().tolist()
            for name in ("PROMPT", "MEDIA", "COST", "MAX_NEW_TOKENS")
            if (tensor := pb_utils.get_input_tensor_by_name(request, name)) is not None
        }
        settings: dict[str, Any] = {}
        if "COST" in given:
            settings["cost"] = given["COST"][0]
        if "MAX_NEW_TOKENS" in given:
            settings["max_new_tokens"] = given["MAX_NEW_TOKENS"][0]
        return given["PROMPT"][0].decode(), given.get("MEDIA", []), Request(**settings)
