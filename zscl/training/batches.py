"""Training batches of a stage: augmented task images, and reference images for distillation."""

from collections.abc import Iterator
from dataclasses import replace

from schemas.experiment import Experiment
from zscl.data.decode import Decoder
from zscl.data.loader import Loader, TrainingImages
from zscl.data.sample import Sample, Samples
from zscl.data.task import TaskFolder
from zscl.methods.interfaces import Batch
from zscl.models.clip import Clip
from zscl.runtime.distributed import rank_slice
from zscl.runtime.seeding import derive_seed


def training_batches(
    experiment: Experiment,
    stage: int,
    task: TaskFolder,
    clip: Clip,
    distillation_samples: Samples | None,
    loader: Loader,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Build the endless iterator over this rank's slices of a stage's global batches.

    Task images use the training transform, reference images the evaluation transform. If there are reference images,
    both kinds of images get half of the memory for decoded images (`compute.decoded_megabytes`).

    Args:
        experiment: The experiment.
        stage: The stage's number, from 1.
        task: The stage's task.
        clip: The model, of which only the image transforms are used.
        distillation_samples: The reference images; `None` if the stage does not use distillation.
        loader: Reads and decodes the images.
        first_step: The step of the first batch, from 0.

    Returns:
        The iterator, which starts with the batch of step `first_step`.
    """
    optimisation = experiment.optimisation
    total_cache_bytes = experiment.compute.decoded_megabytes * 1_000_000
    cache_bytes = total_cache_bytes // (1 if distillation_samples is None else 2)
    images = TrainingImages(
        samples=task.train,
        decoder=Decoder(clip.train_transform, task.get_label),
        seed=derive_seed(experiment.seed, stage, "task"),
        batch_size=optimisation.batch_size,
        rank_indices=rank_slice(optimisation.batch_size),
        first_step=first_step,
        cache_bytes=cache_bytes,
        total_cache_bytes=total_cache_bytes,
    ).iter_batches(loader)
    if distillation_samples is None:
        return (Batch(batch, labels) for batch, labels in images)
    references = TrainingImages(
        samples=distillation_samples,
        decoder=Decoder(clip.evaluation_transform, Sample.identity),
        seed=derive_seed(experiment.seed, stage, "reference"),
        batch_size=optimisation.reference_batch_size,
        rank_indices=rank_slice(optimisation.reference_batch_size),
        first_step=first_step,
        cache_bytes=cache_bytes,
        total_cache_bytes=total_cache_bytes,
    ).iter_batches(replace(loader, labels_on_cpu=True))
    return (
        Batch(*task_batch, *reference_batch) for task_batch, reference_batch in zip(images, references, strict=True)
    )
