"""MLflow: stores, runs, uploads and models."""
