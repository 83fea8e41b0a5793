"""open_clip models: loading, and forward passes without unused work."""
