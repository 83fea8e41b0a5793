"""MLflow: tracking stores, runs, uploads and models."""
