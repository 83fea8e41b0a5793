"""Commands on finished runs and on data: compare, evaluate, average, export."""
