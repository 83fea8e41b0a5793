"""Runs from a recipe: preflight checks, estimate, progress, execution."""
