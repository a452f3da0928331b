"""Answers in a notebook."""
