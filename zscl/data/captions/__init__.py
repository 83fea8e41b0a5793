"""Caption files of a reference set."""
