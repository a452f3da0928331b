"""A decode step on the GPU: its launches captured and replayed, and its token chosen where the logits lie."""
