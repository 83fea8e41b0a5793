"""Pydantic models of recipes, events, results and reports; imports neither PyTorch nor Ray."""
