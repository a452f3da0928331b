"""The types of what `framefusion/__init__.py` loads when it is first used."""

from framefusion.runtime.bundle import Bundle as Bundle
from framefusion.runtime.pipeline import Pipeline as Pipeline
from framefusion.runtime.request import Generation as Generation
from framefusion.runtime.request import Request as Request
from framefusion.runtime.request import Step as Step
from framefusion.runtime.session import Session as Session
from framefusion.runtime.text.prompt import Turn as Turn
from framefusion.runtime.text.prompt import Visual as Visual

__all__ = ("Bundle", "Generation", "Pipeline", "Request", "Session", "Step", "Turn", "Visual")
__version__: str
