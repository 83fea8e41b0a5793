"""Analysis of finished runs, and preparation of data: compare, evaluate, average, export, prepare, check."""
