"""FrameFusion-AOT: token reduction inside the LLM of a video LVLM, compiled ahead of time.

This file stays empty of imports: `import framefusion.runtime` passes through it and must reach nothing heavy.
"""

__version__ = "0.1.0"
