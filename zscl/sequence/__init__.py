"""A sequence of stages, its accuracy matrix and its run folder."""
