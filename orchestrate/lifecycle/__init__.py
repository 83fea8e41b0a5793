"""Life cycle of a run: its folder, lock, status, and signals to the process."""
