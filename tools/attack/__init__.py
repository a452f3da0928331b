"""Attacks on what users and strangers hand in: seeded, of any length, in this process."""
