"""Conversion of public datasets into task folders."""
