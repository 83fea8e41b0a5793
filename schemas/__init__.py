"""What an experiment is: pydantic models, light enough to import in a linter."""
