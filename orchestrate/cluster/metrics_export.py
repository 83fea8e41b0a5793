"""What each worker does now, among Ray's own metrics: for its dashboard, and whatever reads Prometheus' format."""

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


def export_usage(run: str, used: WorkersUsed) -> None:
    """Set the gauges `ray_zscl_…`, each by run and worker; on the main worker."""
    for worker, use in enumerate(used.workers):
        for name in GAUGES:
            if (value := getattr(use, name)) is not None:
                _gauge(name).set(value, tags={"run": run, "worker": str(worker)})
