"""Tests of the packages, the documents and the examples."""
