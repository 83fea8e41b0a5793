"""Ray: connections to clusters, training workers, evaluation tasks and jobs."""
