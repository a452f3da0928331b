"""How long a test waits for what is to happen, and how long goes on what it has to end; never how fast things are."""

PATIENCE = 600
"""Seconds after which something hangs: what works takes a small part of them, on a slow and busy machine as well."""
FOREVER = 4 * PATIENCE
"""Seconds of what never ends by itself within a test: one that waited for it is known by its time."""
