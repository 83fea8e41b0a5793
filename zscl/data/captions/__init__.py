"""Caption files: detection of their format and reading of the captions."""
