"""`lmms-eval --model framefusion`: lmms-eval's tasks answered by a bundle or a live checkpoint.

lmms-eval finds the model by this package's entry point in its group lmms_eval.models, which names the function below.
It is called whenever lmms-eval lists its models, so nothing heavy is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

NAME = "framefusion"


def manifest() -> ModelManifest:
    """What lmms-eval's registry wants to know: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path="framefusion.export.evaluate.lmms_eval.model.FrameFusionModel")
