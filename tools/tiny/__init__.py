"""A tiny video question-answering model of the Qwen2-VL architecture: its clips, its training, its evaluation."""
