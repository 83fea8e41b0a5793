"""Where an experiment runs and where it is recorded: never part of its identity."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from schemas.base import Strict


class Compute(Strict):
    """What one run asks of the cluster."""

    address: str | None = Field(None, description="Ray cluster, as in ray.init; default: RAY_ADDRESS, else a local one")
    workers: PositiveInt = Field(1, description="Ray Train workers; the batch sizes are global, whatever this is")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: GPUs if the cluster has any")
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: PositiveFloat = Field(1.0, description="Fractions share a GPU")
    loader_processes: NonNegativeInt = Field(
        0, description="Processes a worker that read and decode; 0: the worker itself"
    )
    evaluation_batch_size: PositiveInt = Field(256, description="Test images a worker encodes at once")
    max_failures: NonNegativeInt = Field(3, description="Times a failed worker group is started again")


class Tracking(Strict):
    """The MLflow store."""

    uri: str | None = Field(None, description="Any MLflow tracking URI; default: mlflow.db beside the run's folder")
    experiment: str = Field("zscl", min_length=1)
