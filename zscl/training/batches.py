"""The batches of a stage: task images, and images to distil on."""

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
    folder: TaskFolder,
    clip: Clip,
    distilled: Samples | None,
    loader: Loader,
    first_step: int = 0,
) -> Iterator[Batch]:
    """This worker's endless batches of a stage: task images augmented, distilled ones as in evaluation."""
    optimisation = experiment.optimisation
    keep_in = experiment.compute.decoded_megabytes * 1_000_000
    keep_bytes = keep_in // (1 if distilled is None else 2)
    images = TrainingImages(
        samples=folder.train,
        decode=Decoder(clip.train_transform, folder.label_of),
        seed=derive_seed(experiment.seed, stage, "task"),
        batch_size=optimisation.batch_size,
        own=rank_slice(optimisation.batch_size),
        first_step=first_step,
        keep_bytes=keep_bytes,
        keep_in=keep_in,
    ).batches(loader)
    if distilled is None:
        return (Batch(batch, labels) for batch, labels in images)
    references = TrainingImages(
        samples=distilled,
        decode=Decoder(clip.evaluation_transform, Sample.identity),
        seed=derive_seed(experiment.seed, stage, "reference"),
        batch_size=optimisation.reference_batch_size,
        own=rank_slice(optimisation.reference_batch_size),
        first_step=first_step,
        keep_bytes=keep_bytes,
        keep_in=keep_in,
    ).batches(replace(loader, labels_stay=True))
    return (Batch(*ours, *theirs) for ours, theirs in zip(images, references, strict=True))
