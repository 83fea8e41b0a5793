"""Gauges of every worker's throughput and resource usage, which Ray exports to Prometheus with its own metrics."""

from functools import cache

from ray.util.metrics import Gauge

from schemas.events import WorkersUsed

GAUGES = {
    "images_per_second": "Task images and distillation images that a worker trains on, per second",
    "loader_wait_share": "Fraction of the time that a worker waits for data",
    "cpu_cores": "CPU cores that a worker uses, on average",
    "memory_megabytes": "Memory that a worker uses",
    "gpu_memory_megabytes": "GPU memory that a worker uses",
}


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(f"zscl_{name}", description=GAUGES[name], tag_keys=("run", "worker"))


def export_usage(run: str, usage: WorkersUsed) -> None:
    """Set the gauges of all workers. The main worker calls this function.

    In Prometheus, the gauges have names that begin with `ray_zscl_`, and the tags `run` and `worker`.

    Args:
        run: The name of the run's folder.
        usage: The usage of all workers, in the order of their ranks.
    """
    for worker, worker_usage in enumerate(usage.workers):
        for name in GAUGES:
            if (value := getattr(worker_usage, name)) is not None:
                _gauge(name).set(value, tags={"run": run, "worker": str(worker)})
