"""Results, charts, comparisons and pages; without Ray and MLflow."""
