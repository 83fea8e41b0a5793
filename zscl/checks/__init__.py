"""Validation of task folders, sample by sample."""
