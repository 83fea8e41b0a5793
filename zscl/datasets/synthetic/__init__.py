"""The embedded benchmark: pictures rendered from seeds, without any download."""
