"""Gauges of each worker's current throughput and resource usage, exported among Ray's own metrics (Prometheus)."""

from functools import cache

from ray.util.metrics import Gauge

from schemas.events import WorkersUsed

GAUGES = {
    "images_per_second": "Task and distilled images that a worker trains on",
    "loader_wait_share": "Share of the time that a worker waits for data",
    "cpu_cores": "CPU cores that a worker keeps busy",
    "memory_megabytes": "Memory that a worker holds",
    "gpu_memory_megabytes": "GPU memory that a worker holds",
}


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(f"zscl_{name}", description=GAUGES[name], tag_keys=("run", "worker"))


def export_usage(run: str, usage: WorkersUsed) -> None:
    """Set the gauges `ray_zscl_…`, with the tags `run` and `worker`. Called on the main worker.

    Args:
        run: The name of the run's folder.
        usage: The usage of all workers, by rank.
    """
    for worker, worker_usage in enumerate(usage.workers):
        for name in GAUGES:
            if (value := getattr(worker_usage, name)) is not None:
                _gauge(name).set(value, tags={"run": run, "worker": str(worker)})
