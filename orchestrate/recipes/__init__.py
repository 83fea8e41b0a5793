"""Recipes: reading YAML files and overrides, and parsing them into experiments."""
