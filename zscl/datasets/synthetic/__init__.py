"""The embedded benchmark: pictures rendered from seeds."""
