"""Several callers of one backend: threads and tasks of asyncio."""
