"""Validation of task folders, sample by sample (`zscl data check`)."""
