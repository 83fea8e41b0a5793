"""Recipes: YAML files and overrides, parsed into experiments."""
