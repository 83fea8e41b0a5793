"""Where an experiment runs and where it is recorded: never part of its identity."""

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

Saving = Literal["auto", "always", "never"]


class Savings(StrictModel):
    """Exact savings of a training step: the same numbers for less work.

    auto: where the model allows it; always: a model that does not allow it is refused; never: the plain way.
    """

    context_cut: Saving = Field("auto", description="Prompts end at the longest one's end token")
    packed_prompts: Saving = Field(
        "auto", description="What all prompts begin with is computed once; no padding; only with context_cut"
    )
    pooled_row: Saving = Field("auto", description="The last block of a tower for the pooled token alone")
    used_embeddings: Saving = Field("auto", description="Token embeddings that no prompt uses are left alone")
    one_pass: bool = Field(True, description="Task and distilled images go through the student together")
    multi_tensor: bool = Field(True, description="Averages and consolidation over all parameters at once")
    fused_optimizer: bool = Field(True, description="AdamW in one kernel")

    @model_validator(mode="after")
    def _packs_what_is_cut(self) -> "Savings":
        if self.packed_prompts == "always" and self.context_cut == "never":
            raise ValueError("packed_prompts is always with context_cut never, expected auto: packed prompts are cut")
        return self


class Checkpoint(StrictModel):
    """How much work an interruption may cost; the end of a stage is always kept."""

    every_minutes: PositiveFloat = Field(10.0, description="Time between checkpoints inside a stage")
    every_steps: PositiveInt | None = Field(None, description="Also after so many steps of a stage")


class Compute(StrictModel):
    """What one run asks of the cluster."""

    address: str | None = Field(None, description="Ray cluster, as in ray.init; default: RAY_ADDRESS, else a local one")
    workers: PositiveInt = Field(1, description="Ray Train workers; the batch sizes are global, whatever this is")
    min_workers: PositiveInt | None = Field(
        None,
        description="Elastic: start with as few, and go on with as few where the cluster loses some; default: all",
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: GPUs if the cluster has any")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPU cores that Ray sets aside for a worker")
    gpus_per_worker: PositiveFloat = Field(1.0, description="Fractions share a GPU")
    loader_processes: NonNegativeInt = Field(
        0, description="Processes a worker that read and decode; 0: the worker itself"
    )
    storage: Location | None = Field(
        None,
        description="URL in object storage (s3://BUCKET/runs) under which the run's folder is kept, for nodes that "
        "share no file system: each works in a folder of its own; default: all nodes see the run's folder",
    )
    shard_cache: Location | None = Field(
        None, description="Local folder that remote shards are copied to, once; default: they are streamed"
    )
    decoded_megabytes: NonNegativeInt = Field(
        512, description="Memory a worker keeps decoded training images in, so that small tasks are decoded once"
    )
    max_broken_share: Share = Field(
        0.01, description="Share of a set's samples that may be unusable; they are skipped and named"
    )
    evaluation_batch_size: PositiveInt = Field(256, description="Test images a worker encodes at once")
    evaluation: Literal["inline", "overlapped"] = Field(
        "inline",
        description="overlapped: a row of the matrix is measured by a task of its own, with a worker's resources, "
        "while the next stage trains; the same matrix",
    )
    checkpoint: Checkpoint = Field(Checkpoint(), description="How often the stage under way is kept")
    snapshots_every: PositiveInt | None = Field(
        None, description="Keep a stage's weights every so many steps, for `zscl average`; a whole model each"
    )
    max_failures: NonNegativeInt = Field(
        3, description="Times in a row that a failed worker group is started again without having come further"
    )
    hang_minutes: PositiveFloat = Field(
        30.0, description="A worker that neither answers nor takes part in a collective for so long is given up"
    )
    grace_seconds: NonNegativeFloat = Field(
        25.0,
        description="How long to wait for a last checkpoint after a signal (SIGTERM, Ctrl-C, SIGHUP, SIGUSR1, SIGUSR2)",
    )
    teacher_features: Literal["auto", "ahead", "as_met", "never"] = Field(
        "auto",
        description="The initial model's features of the distilled images: all computed ahead of training, or stored "
        "as images are met, or never stored; auto: ahead where the run meets nearly all of them anyway, else as_met",
    )
    savings: Savings = Field(Savings(), description="Exact savings of a training step")
    deterministic: bool = Field(
        True, description="GPU: kernels that give the same bits in every run; a CPU's always do"
    )
    images_at_once: PositiveInt | None = Field(
        None,
        description="Gradient accumulation: a worker's images pass the student in parts of so many, computed again in "
        "the backward pass; every loss, distillation included, still sees the whole global batch",
    )
    gradient_checkpointing: bool = Field(
        False, description="Forget each block's activations and compute them again in the backward pass"
    )
    compile: bool = Field(False, description="torch.compile of the image tower; changes numbers by round-off")

    @field_validator("storage")
    @classmethod
    def _is_a_url(cls, storage: str | None) -> str | None:
        if storage is not None and "://" not in storage:
            raise ValueError(
                f"found {storage}, expected a URL such as s3://BUCKET/runs; --out gives a folder that all nodes see"
            )
        return storage

    @model_validator(mode="after")
    def _fewer_than_all(self) -> "Compute":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, expected at most the {self.workers} workers")
        if self.evaluation == "overlapped" and self.min_workers not in (None, self.workers):
            raise ValueError(
                "evaluation is overlapped with min_workers, expected inline: an elastic group takes the room that the "
                "rows are measured in"
            )
        return self


def _expand_file(uri: str) -> str:
    """Expand `~` and variables in the path of a store that is a file; URIs of servers may hold passwords with a `$`."""
    scheme, separator, path = uri.partition(":///")
    return f"{scheme}{separator}{expand_path(path)}" if separator and scheme in ("sqlite", "file") else uri


class Tracking(StrictModel):
    """The MLflow store."""

    uri: Annotated[str, AfterValidator(_expand_file)] | None = Field(
        None, description="Any MLflow tracking URI; default: mlflow.db beside the run's folder"
    )
    experiment: str = Field("zscl", min_length=1, description="MLflow's experiment that runs are filed under")
    models: Literal["all", "last", "none"] = Field(
        "all", description="Which stages' models join MLflow's, as copies; of a search's trials, none do"
    )
