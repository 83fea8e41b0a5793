"""Results of runs, charts, comparisons and HTML pages. This package does not use Ray or MLflow."""
