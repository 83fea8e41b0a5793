"""Ray: clusters, training workers, evaluation tasks and jobs."""
