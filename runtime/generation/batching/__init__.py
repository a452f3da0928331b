"""Decode of several requests in one call: a row each, over caches that they share."""
