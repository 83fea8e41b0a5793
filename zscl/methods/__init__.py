"""Losses, weight averaging, exemplars and distillation targets."""
