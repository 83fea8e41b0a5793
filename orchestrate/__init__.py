"""Where it runs: Ray, MLflow and the command line."""
