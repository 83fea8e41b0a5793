"""A run's folder, lock, state and signals."""
