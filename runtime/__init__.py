"""The runtime: a bundle and a video in, text out. numpy, onnxruntime, tokenizers, PyAV and Pillow; never torch."""
