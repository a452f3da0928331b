"""The model of examples/triton beside a stand-in for Triton's module, and its configuration by Triton's schema.

Triton itself is not run here. The schema is tritonclient's, which cannot be a requirement of the tests (its ml-dtypes
is older than ours): `pip install --no-deps tritonclient` brings it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from framefusion.runtime.pipeline import Pipeline, Request
from tests.bundles import shared
from tests.films import write_film
from tests.wheel import ROOT

REPOSITORY = ROOT / "examples" / "triton"
MODEL = REPOSITORY / "framefusion" / "1" / "model.py"


class Tensor:
    def __init__(self, name: str, values: Any) -> None:
        self.name = name
        self.values = values

    def as_numpy(self) -> Any:
        return self.values


class Response:
    def __init__(self, tensors: Any = (), error: Any = None) -> None:
        self.tensors = tensors
        self.error = error


class TritonRequest:
    """A request, and what was sent for it."""

    def __init__(self, **inputs: Any) -> None:
        self.inputs = inputs
        self.sent: list[Any] = []

    def get_response_sender(self) -> TritonRequest:
        return self

    def send(self, response: Any = None, flags: Any = None) -> None:
        self.sent.append(flags if response is None else response)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    triton: Any = ModuleType("triton_python_backend_utils")
    triton.Tensor = Tensor
    triton.InferenceResponse = Response
    triton.TritonError = str
    triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = "final"
    triton.get_input_tensor_by_name = lambda request, name: (
        Tensor(name, request.inputs[name]) if name in request.inputs else None
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    spec = importlib.util.spec_from_file_location("triton_model", MODEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    opened = module.TritonPythonModel()
    opened.initialize({"model_config": json.dumps({"parameters": {"bundle": {"string_value": str(shared("bundle"))}}})})
    yield opened
    opened.finalize()


def read_config(text: str) -> Any:
    """A model's configuration, as Triton reads it."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"  # its package wants grpc
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    return text_format.Parse(text, schema.ModelConfig())


def test_the_configuration_is_one_by_tritons_schema_and_names_what_the_model_reads() -> None:
    (folder,) = REPOSITORY.iterdir()
    config = read_config((folder / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.backend, config.max_batch_size) == (folder.name, "python", 0)
    assert config.model_transaction_policy.decoupled  # `execute` returns nothing and sends pieces
    assert (folder / "1" / "model.py").is_file()  # the version and the file that Triton's Python backend looks for
    names = {value.number: value.name for value in config.DESCRIPTOR.file.enum_types_by_name["DataType"].values}
    tensors = {each.name: (names[each.data_type], list(each.dims), each.optional) for each in config.input}
    assert tensors == {
        "PROMPT": ("TYPE_STRING", [1], False),
        "MEDIA": ("TYPE_STRING", [-1], True),
        "COST": ("TYPE_FP32", [1], True),
        "MAX_NEW_TOKENS": ("TYPE_INT32", [1], True),
    }
    source = MODEL.read_text(encoding="utf-8")
    assert f"for name in {tuple(tensors)!r}".replace("'", '"') in source
    assert [(each.name, names[each.data_type]) for each in config.output] == [("TEXT", "TYPE_STRING")]
    assert list(config.parameters) == ["bundle"]
    assert config.parameters["bundle"].string_value.startswith("/")


@pytest.mark.parametrize(
    "line", ['inputs [ { name: "X" } ]', "max_batch_size: many", "input [ { data_type: TYPE_TEXT } ]"]
)
def test_the_schema_refuses_what_triton_would(line: str) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    text = (REPOSITORY / "framefusion" / "config.pbtxt").read_text(encoding="utf-8")
    with pytest.raises(text_format.ParseError):
        read_config(f"{text}\n{line}")


@pytest.mark.slow
def test_pieces_are_the_answer_and_errors_are_named(model: Any, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4")
    texts = np.array([b"What happens?"], np.object_)
    good = TritonRequest(
        PROMPT=texts, MEDIA=np.array([film.read_bytes()], np.object_), COST=np.array([0.4], np.float32),
        MAX_NEW_TOKENS=np.array([5], np.int32),
    )  # fmt: skip
    bad = TritonRequest(PROMPT=texts, MEDIA=np.array([b"no film"], np.object_))
    model.execute([good, bad])
    with Pipeline(shared("bundle")) as pipeline:
        alone = pipeline.generate("What happens?", [film], Request(5, cost=float(np.float32(0.4))))
    assert "".join(piece.tensors[0].values[0].decode() for piece in good.sent[:-1]) == alone.text
    assert good.sent[-1] == bad.sent[-1] == "final"
    assert bad.sent[0].error.startswith("VideoError: ")
