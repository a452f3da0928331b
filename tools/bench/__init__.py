"""Benchmarks. Each is one command, runs its alternatives in turn in one process, and prints and writes JSON."""
