"""The recipe sections `compute` and `tracking`: where an experiment runs and where it is recorded."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from schemas.base import Location, Share, StrictModel, expand_path
from schemas.errors import ErrorCode, InputError

Saving = Literal["auto", "always", "never"]


class Savings(StrictModel):
    """Optimisations of a training step that do not change its results.

    `auto` enables an optimisation if the model supports it. `always` enables it; a model that does not support it is an
    error. `never` disables it.
    """

    context_cut: Saving = Field("auto", description="Truncate the context to the longest prompt of the batch")
    packed_prompts: Saving = Field(
        "auto", description="Compute the common prefix of all prompts once, without padding; needs context_cut"
    )
    pooled_row: Saving = Field("auto", description="Compute the last block of a tower for the pooled token only")
    used_embeddings: Saving = Field("auto", description="Update only the token embeddings that prompts use")
    one_pass: bool = Field(True, description="One forward pass of the student for task and distillation images")
    multi_tensor: bool = Field(True, description="Multi-tensor kernels for averages and consolidation")
    fused_optimizer: bool = Field(True, description="Fused AdamW kernel")

    @model_validator(mode="after")
    def _check_packed_prompts(self) -> "Savings":
        if self.packed_prompts == "always" and self.context_cut == "never":
            raise InputError(
                "packed_prompts=always needs context_cut, which is never. Set context_cut or packed_prompts to auto",
                code=ErrorCode.CONFLICT,
                field="packed_prompts",
            )
        return self


class Checkpoint(StrictModel):
    """Intervals between checkpoints within a stage. The end of a stage is always saved."""

    every_minutes: PositiveFloat = Field(10.0, description="Minutes between checkpoints within a stage")
    every_steps: PositiveInt | None = Field(None, description="Also save a checkpoint every N steps of a stage")


class Compute(StrictModel):
    """Resources, storage and execution options of a run."""

    address: str | None = Field(
        None, description="Ray cluster, as in ray.init; default: RAY_ADDRESS, else a local cluster"
    )
    workers: PositiveInt = Field(
        1, description="Ray Train workers; batch sizes are global, so they do not depend on it"
    )
    min_workers: PositiveInt | None = Field(
        None,
        description="Elastic training: minimum number of workers to start or to continue with; default: all",
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: GPUs if the cluster has any")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPU cores that Ray reserves per worker")
    gpus_per_worker: PositiveFloat = Field(1.0, description="GPUs per worker; fractions share a GPU")
    loader_processes: NonNegativeInt = Field(
        0, description="Processes per worker that read and decode images; 0: the worker reads and decodes them itself"
    )
    storage: Location | None = Field(
        None,
        description="Object storage URL (s3://BUCKET/runs) to which the run's folder is synchronised, for nodes "
        "without a shared file system: each node has its own copy; default: all nodes share the run's folder",
    )
    shard_cache: Location | None = Field(
        None, description="Local folder to which remote shards are copied once; default: they are streamed"
    )
    decoded_megabytes: NonNegativeInt = Field(
        512, description="Memory per worker for decoded training images, so that small tasks are decoded once"
    )
    max_broken_share: Share = Field(
        0.01,
        description="Fraction of a dataset's samples that may be unusable; these are skipped and reported",
    )
    evaluation_batch_size: PositiveInt = Field(256, description="Test images per forward pass of a worker")
    evaluation: Literal["inline", "overlapped"] = Field(
        "inline",
        description="overlapped: a separate Ray task with a worker's resources measures a row of the matrix while "
        "the next stage trains; the results are the same",
    )
    checkpoint: Checkpoint = Field(Checkpoint(), description="How often the current stage is saved")
    snapshots_every: PositiveInt | None = Field(
        None, description="Save the weights every N steps of a stage, for `zscl average`; each snapshot is a full model"
    )
    max_failures: NonNegativeInt = Field(
        3, description="Maximum number of consecutive restarts of a failed worker group without progress"
    )
    hang_minutes: PositiveFloat = Field(
        30.0, description="Timeout for a worker that does not respond or does not join a collective"
    )
    grace_seconds: NonNegativeFloat = Field(
        25.0,
        description="Seconds to wait for a last checkpoint after a signal (SIGTERM, Ctrl-C, SIGHUP, SIGUSR1, SIGUSR2)",
    )
    teacher_features: Literal["auto", "ahead", "as_met", "never"] = Field(
        "auto",
        description="Cache of the initial model's features of the distillation images. ahead: all are computed before "
        "training; as_met: the features of an image are stored when it is first used; never: no features are stored; "
        "auto: ahead if the run uses nearly all images, else as_met",
    )
    savings: Savings = Field(Savings(), description="Optimisations of a training step that do not change its results")
    deterministic: bool = Field(True, description="Use deterministic GPU kernels; CPU kernels are always deterministic")
    images_at_once: PositiveInt | None = Field(
        None,
        description="Gradient accumulation: images per forward pass of the student, recomputed in the backward pass; "
        "every loss, including distillation, is still computed on the global batch",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute the activations of each block in the backward pass"
    )
    compile: bool = Field(False, description="torch.compile of the image tower; changes results by rounding errors")

    @field_validator("storage")
    @classmethod
    def _check_storage_url(cls, storage: str | None) -> str | None:
        if storage is not None and "://" not in storage:
            raise ValueError(
                f"found {storage}, expected a URL such as s3://BUCKET/runs; for a folder that all nodes see, use --out"
            )
        return storage

    @model_validator(mode="after")
    def _check_elastic_workers(self) -> "Compute":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise InputError(
                f"min_workers is {self.min_workers}, expected at most workers, which is {self.workers}",
                code=ErrorCode.INVALID_VALUE,
                field="min_workers",
            )
        if self.evaluation == "overlapped" and self.min_workers not in (None, self.workers):
            raise InputError(
                "evaluation=overlapped cannot be used with min_workers, because an elastic group takes the resources "
                "that the evaluation needs. Set evaluation to inline, or remove min_workers",
                code=ErrorCode.CONFLICT,
                field="evaluation",
            )
        return self


def _expand_store_path(uri: str) -> str:
    """Expand `~` and variables in an sqlite or file URI. Others are unchanged: a password in them may contain `$`."""
    scheme, separator, path = uri.partition(":///")
    return f"{scheme}{separator}{expand_path(path)}" if separator and scheme in ("sqlite", "file") else uri


class Tracking(StrictModel):
    """The MLflow store that records the run."""

    uri: Annotated[str, AfterValidator(_expand_store_path)] | None = Field(
        None, description="Any MLflow tracking URI; default: mlflow.db next to the run's folder"
    )
    experiment: str = Field("zscl", min_length=1, description="MLflow experiment of the run")
    models: Literal["all", "last", "none"] = Field(
        "all", description="Stages whose models are copied to MLflow; models of search trials are never copied"
    )
