"""What a caller says to a model, turn by turn. How it becomes token ids is in runtime/text/prompt.py."""

from framefusion.runtime.text.prompt import (
    PromptTemplate,
    Turn,
    TurnLayout,
    Visual,
)

__all__ = [
    "PromptTemplate",
    "Turn",
    "TurnLayout",
    "Visual",
]
