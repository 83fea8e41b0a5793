"""Helpers of several tests: small data, models, command lines and faults."""
