"""Datasets: tasks and reference sets, samples of tar shards and image folders, decoding and batching."""
