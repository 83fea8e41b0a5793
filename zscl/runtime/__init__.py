"""Process-level services: atomic writes, retries, hashing, collectives, seeds."""
