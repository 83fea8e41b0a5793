"""Samples of tar shards and image folders, decoded and batched."""
