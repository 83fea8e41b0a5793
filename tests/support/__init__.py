"""Helpers that several tests use: small data, models, command lines and faults."""
