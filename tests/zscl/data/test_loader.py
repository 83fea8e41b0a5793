"""Data loading: global batches do not depend on workers and processes; unusable samples are skipped and reported."""

import io
import pickle
import re
import socket
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, UnidentifiedImageError
from support.data import coloured_images, open_task
from support.errors import refused
from torchvision.transforms import Compose, RandomResizedCrop, ToTensor

from schemas.errors import ErrorCode, InputError
from schemas.experiment import Model
from zscl.checks.image import ImageFacts, inspect_image
from zscl.data.decode import IMAGE_FORMATS, MAX_ASPECT_RATIO, Decoder, decode_image
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import BatchedDataset, DecodedImageCache, EvaluationImages, Loader, TrainingImages
from zscl.data.sample import NoiseSamples, Sample
from zscl.data.shard_urls import open_samples
from zscl.data.tar import write_shards
from zscl.models.clip import Clip, load_clip

AUGMENT = Compose([RandomResizedCrop(8, scale=(0.3, 1.0)), ToTensor()])
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def label_of(sample: Sample) -> int:
    return int(sample.label or b"-1")


@pytest.fixture
def samples(tmp_path: Path) -> IndexedSamples:
    write_shards(
        tmp_path, ({"png": image, "cls": str(n).encode()} for n, (image, _) in enumerate(coloured_images(10, 0))), 4
    )
    samples = open_samples([str(tmp_path)])
    assert isinstance(samples, IndexedSamples)
    return samples


@pytest.fixture
def clip(tiny_model: str) -> Clip:
    return load_clip(Model(name=tiny_model))


def batches(
    samples: IndexedSamples, rank_indices: range, processes: int = 0, first_step: int = 0, count: int = 5, seed: int = 3
) -> Batches:
    images = TrainingImages(samples, Decoder(AUGMENT, label_of), seed, 6, rank_indices, first_step)
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]] = images.iter_batches(Loader(torch.device("cpu"), processes))
    return list(islice(stream, count))


def same(left: Batches, right: Batches) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True))


def test_workers_share_the_one_global_batch_augmentation_included(samples: IndexedSamples) -> None:
    whole = batches(samples, range(6))
    first, second = batches(samples, range(0, 2)), batches(samples, range(2, 6))
    joined = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(first, second, strict=True)]
    assert same(joined, whole)
    assert not torch.equal(whole[0][0][0], whole[0][0][1])


@pytest.mark.parametrize("processes", [1, 4])
def test_loader_processes_change_nothing(samples: IndexedSamples, processes: int) -> None:
    assert same(batches(samples, range(6), processes), batches(samples, range(6)))


def test_loader_processes_send_batches_whatever_the_temporary_folder_is_called(
    samples: IndexedSamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("a_folder_of_a_job_of_slurm" * 4)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    images = EvaluationImages(samples, Decoder(ToTensor(), label_of), 0, 1)
    assert sum(len(labels) for _, labels in images.iter_batches(4, Loader(torch.device("cpu"), 1))) == 10


@pytest.mark.parametrize("processes", [0, 1, 4])
@pytest.mark.parametrize("first_step", [1, 2, 5])
def test_resumes_from_any_step(samples: IndexedSamples, processes: int, first_step: int) -> None:
    whole = batches(samples, range(6), count=6)
    assert same(batches(samples, range(6), processes, first_step, count=6 - first_step), whole[first_step:])


def test_seed_and_position_draw_order_and_augmentation(samples: IndexedSamples, tmp_path: Path) -> None:
    labels = [torch.cat([label for _, label in batches(samples, range(6), seed=seed)]) for seed in (3, 4)]
    assert not torch.equal(*labels)
    one = samples.subset([0])  # of one image, all that differs is its augmentation
    first, other = (torch.cat([images for images, _ in batches(one, range(6), seed=seed)]) for seed in (3, 4))
    assert len(first.unique(dim=0)) > 0.8 * len(first)  # crops of few pixels may be the same by chance
    assert len(torch.cat([first, other]).unique(dim=0)) > 1.6 * len(first)


def test_idle_datasets_are_evicted_from_the_cache(samples: IndexedSamples) -> None:
    cache, decoder = DecodedImageCache(), Decoder(AUGMENT, label_of)
    shown = list(samples.iter_shard(0, 1))
    size = 4 * 16 * 16  # bytes of an image: Pillow takes four for a pixel

    def again(name: str, number: int, budget: int, total: int) -> bool:
        """Whether an image of a set is the very one that was decoded before."""
        first, second = (cache.get_or_decode(name, shown[number], decoder, budget, total) for _ in range(2))
        return first is second

    assert not again("none", 0, 0, 10 * size)
    with cache.open_reader("first"):
        assert [again("first", number, 2 * size, 10 * size) for number in range(3)] == [
            True,
            True,
            False,
        ]  # its own budget
        with cache.open_reader("second"):  # all sets' budget; the first is being read, so it stays
            assert [again("second", number, 9 * size, 3 * size) for number in range(2)] == [True, False]
    with cache.open_reader("third"):  # nobody reads the others any more
        assert [again("third", number, 9 * size, 3 * size) for number in range(4)] == [True, True, True, False]


def test_the_global_random_state_does_not_change(samples: IndexedSamples) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    batches(samples, range(6))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("workers", "processes"), [(1, 0), (2, 0), (3, 2), (12, 0)])
def test_evaluation_sees_every_image_once(samples: IndexedSamples, workers: int, processes: int) -> None:
    seen: list[int] = []
    for worker in range(workers):
        images = EvaluationImages(samples, Decoder(ToTensor(), label_of), worker, workers)
        seen += [int(n) for _, labels in images.iter_batches(4, Loader(torch.device("cpu"), processes)) for n in labels]
    assert sorted(seen) == list(range(10))


def write_samples(folder: Path, broken: dict[int, bytes], count: int = 40) -> IndexedSamples:
    """Write samples, some with broken images. The label is the sample's number."""
    images = enumerate(image for image, _ in coloured_images(count, 0))
    write_shards(folder, ({"png": broken.get(n, image), "cls": str(n).encode()} for n, image in images), 16)
    samples = open_samples([str(folder)])
    assert isinstance(samples, IndexedSamples)
    return samples


def bomb() -> bytes:
    """A small file that claims 225 million pixels."""
    stream = io.BytesIO()
    Image.new("1", (15_000, 15_000)).save(stream, "PNG")
    return stream.getvalue()


def tolerant_loader(share: float, processes: int = 0) -> tuple[Loader, list[str]]:
    messages: list[str] = []
    return Loader(torch.device("cpu"), processes, max_broken_share=share, on_skip=messages.append), messages


@pytest.mark.parametrize("processes", [0, 2])
def test_evaluation_skips_and_names_what_is_broken(tmp_path: Path, processes: int) -> None:
    truncated = next(coloured_images(1, 5))[0][:60]
    samples = write_samples(tmp_path, {3: b"no image", 17: truncated, 39: b""})
    loader, messages = tolerant_loader(0.1, processes)
    images = EvaluationImages(samples, Decoder(ToTensor(), label_of), 0, 1)
    seen = [int(n) for _, labels in images.iter_batches(4, loader) for n in labels]
    assert sorted(seen) == [n for n in range(40) if n not in (3, 17, 39)]
    assert len(messages) == len(loader.broken_samples) == 3
    assert any(f"{tmp_path}/0.tar: sample '0000003' is no readable image" in sentence for sentence in messages)
    assert any(f"{tmp_path}/1.tar: sample '0000017' is no readable image" in sentence for sentence in messages)


@pytest.mark.parametrize("processes", [0, 2])
def test_too_many_broken_samples_end_the_stream_by_name(tmp_path: Path, processes: int) -> None:
    samples = write_samples(tmp_path, {3: b"no image", 17: b"nor this"})
    images = EvaluationImages(samples, Decoder(ToTensor(), label_of), 0, 1)
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        list(images.iter_batches(4, tolerant_loader(0.04, processes)[0]))
    assert re.match(
        r".*\.tar: sample '00000\d\d' is no readable image .* found 2 unusable samples of 40", str(error.value)
    )
    assert len([n for _, labels in images.iter_batches(4, tolerant_loader(0.05, processes)[0]) for n in labels]) == 38


def test_a_decompression_bomb_is_a_broken_sample(tmp_path: Path) -> None:
    images = EvaluationImages(write_samples(tmp_path, {0: bomb()}), Decoder(ToTensor(), label_of), 0, 1)
    loader, messages = tolerant_loader(0.1)
    assert len([n for _, labels in images.iter_batches(4, loader) for n in labels]) == 39
    assert "decompression bomb" in messages[0]


@pytest.mark.parametrize("remote", [False, True])
def test_the_substitute_of_a_broken_sample_does_not_depend_on_workers(tmp_path: Path, remote: bool) -> None:
    whole = open_samples([str(write_samples(tmp_path / "whole", {}).files[0].parent)])
    folder = tmp_path / "part"
    write_samples(folder, {3: b"no image", 17: b"nor this"})
    samples = open_samples([f"file://{folder}/{{0..2}}.tar" if remote else str(folder)])

    def read(rank_indices: range, processes: int = 0, first_step: int = 0, count: int = 10) -> Batches:
        images = TrainingImages(samples, Decoder(AUGMENT, label_of), 3, 6, rank_indices, first_step)
        return list(islice(images.iter_batches(tolerant_loader(0.9, processes)[0]), count))

    single = read(range(6))
    assert all(images.shape == (6, 3, 8, 8) for images, _ in single)
    drawn = {int(n) for _, labels in single for n in labels}
    assert drawn.isdisjoint({3, 17})
    assert same(read(range(6), processes=2), single)
    assert same(read(range(6), first_step=4, count=6), single[4:])
    first, second = read(range(0, 2)), read(range(2, 6))
    assert same([(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(first, second, strict=True)], single)
    if not remote:  # usable samples have the same positions as in an intact dataset
        intact = TrainingImages(whole, Decoder(AUGMENT, label_of), 3, 6, range(6)).iter_batches(tolerant_loader(0.0)[0])
        for (_, found), (_, expected) in zip(single, intact, strict=False):
            assert all(a == b or b in (3, 17) for a, b in zip(found.tolist(), expected.tolist(), strict=True))


def test_a_stream_whose_first_sample_is_broken_has_substitutes(tmp_path: Path) -> None:
    write_samples(tmp_path, {})
    urls = [f"file://{tmp_path}/{{0..2}}.tar"]
    first = next(open_samples(urls).iter_positions([0], 3))(0)
    write_samples(tmp_path, {int(first.label or b""): b"no image"})
    images = TrainingImages(open_samples(urls), Decoder(AUGMENT, label_of), 3, 6, range(6))
    loader, messages = tolerant_loader(0.05)
    found = list(islice(images.iter_batches(loader), 20))
    assert len(messages) == 1
    assert all(len(labels) == 6 for _, labels in found)


def test_a_broken_training_sample_is_reported_once(tmp_path: Path) -> None:
    loader, messages = tolerant_loader(0.1)
    images = TrainingImages(write_samples(tmp_path, {3: b"no image"}), Decoder(AUGMENT, label_of), 3, 6, range(6))
    list(islice(images.iter_batches(loader), 40))  # six epochs
    assert messages == [f"skipped {sentence}" for sentence in loader.broken_samples]
    assert [sentence.partition(": ")[2] for sentence in loader.broken_samples] == [
        "sample '0000003' is no readable image (found 8 bytes of no known format)"
    ]


def test_training_accepts_a_share_of_broken_samples(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, dict.fromkeys(range(3), b"no image"), count=20)
    for share, is_refused in ((0.15, False), (0.14, True)):
        read = TrainingImages(samples, Decoder(AUGMENT, label_of), 3, 6, range(6)).iter_batches(
            tolerant_loader(share)[0]
        )
        if is_refused:
            with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
                list(islice(read, 8))
            assert "found 3 unusable samples of 20, expected at most a fraction of 0.14" in str(error.value)
        else:
            assert len(list(islice(read, 8))) == 8


def test_a_set_with_nothing_usable_ends(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, dict.fromkeys(range(3), b"no image"), count=3)
    images = TrainingImages(samples, Decoder(AUGMENT, label_of), 3, 2, range(2))
    with refused(ErrorCode.BROKEN_SAMPLES):
        next(images.iter_batches(tolerant_loader(0.99)[0]))


def test_a_single_sample_is_an_endless_stream(tmp_path: Path) -> None:
    images = TrainingImages(write_samples(tmp_path, {}, count=1), Decoder(AUGMENT, label_of), 3, 4, range(4))
    found = list(islice(images.iter_batches(Loader(torch.device("cpu"))), 3))
    assert [labels.tolist() for _, labels in found] == [[0] * 4] * 3


class CountingDecode(Decoder):
    """Counts the images it decodes."""

    decoded: ClassVar[list[str]] = []

    def load_image(self, sample: Sample) -> Image.Image:
        self.decoded.append(sample.key)
        return super().load_image(sample)


@pytest.mark.parametrize(("cache_bytes", "decoded"), [(10**6, 10), (5 * 4 * 16 * 16, 5 + 5 * 6), (0, 60)])
def test_images_are_decoded_once_within_the_budget(
    samples: IndexedSamples, cache_bytes: int, decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zscl.data.loader._image_cache", DecodedImageCache())  # nothing that other tests still read
    CountingDecode.decoded.clear()
    images = TrainingImages(samples, CountingDecode(AUGMENT, label_of), 3, 6, range(6), cache_bytes=cache_bytes)
    found = list(islice(images.iter_batches(Loader(torch.device("cpu"))), 10))  # six epochs of ten images
    assert len(CountingDecode.decoded) == decoded
    assert same(found, batches(samples, range(6), count=10))


@pytest.mark.parametrize(("share", "is_refused"), [(0.15, False), (0.13, True)])
def test_a_set_of_unknown_size_is_judged_by_what_was_drawn_so_far(
    share: float, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of seven: 0.14 of them."""
    monkeypatch.setattr("zscl.data.loader.MIN_SAMPLES_FOR_SHARE", 0)
    image = (torch.zeros(3, 8, 8), 0)
    loader = Loader(torch.device("cpu"), max_broken_share=share)
    read = loader(
        BatchedDataset(lambda: iter([image, image, image, image, "one is broken", image, image]), 3), total=None
    )
    next(read)
    if is_refused:
        with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
            next(read)
        assert "one is broken; found 1 unusable samples of 7" in str(error.value)
    else:
        assert len(next(read)[0]) == 3


@pytest.mark.parametrize("labels_on_cpu", [False, True])
def test_batches_are_on_the_device_and_labels_where_requested(samples: IndexedSamples, labels_on_cpu: bool) -> None:
    loader = Loader(torch.device("meta"), labels_on_cpu=labels_on_cpu)
    images, labels = next(EvaluationImages(samples, Decoder(AUGMENT, label_of), 0, 1).iter_batches(4, loader))
    assert images.is_meta
    assert labels.is_meta != labels_on_cpu


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_only_known_formats_are_decoded_and_as_rgb(form: str, mode: str) -> None:
    encoded = io.BytesIO()
    Image.new(mode if form != "JPEG" or mode != "P" else "L", (4, 4), 7).save(encoded, form)
    if form in IMAGE_FORMATS:
        assert decode_image(encoded.getvalue()).mode == "RGB"
    else:
        with pytest.raises(UnidentifiedImageError):
            decode_image(encoded.getvalue())


def test_an_image_may_be_long_to_a_limit() -> None:
    for length, fits in ((MAX_ASPECT_RATIO, True), (MAX_ASPECT_RATIO + 1, False)):
        encoded = io.BytesIO()
        Image.new("L", (length, 1)).save(encoded, "PNG")
        if fits:
            assert decode_image(encoded.getvalue()).size == (length, 1)
        else:
            with pytest.raises(
                ValueError, match=rf"found {length} x 1 pixels, expected an aspect ratio of at most {MAX_ASPECT_RATIO}"
            ):
                decode_image(encoded.getvalue())


def test_a_batch_that_only_skips_has_no_image() -> None:
    [(images, labels, skipped, _)] = BatchedDataset(lambda: iter(["one is broken"]), 3)()
    assert (len(images), len(labels), skipped) == (0, 0, ["one is broken"])


def test_evaluation_comes_in_batches(samples: IndexedSamples) -> None:
    images = EvaluationImages(samples, Decoder(ToTensor(), label_of), 0, 1)
    assert [len(labels) for _, labels in images.iter_batches(4, Loader(torch.device("cpu")))] == [4, 4, 2]


@pytest.mark.parametrize("form", ["PNG", "PPM"])
def test_of_16_bits_the_upper_8_are_seen(form: str) -> None:
    wide, encoded = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16), io.BytesIO()
    Image.fromarray(wide).save(encoded, form)
    seen = np.asarray(decode_image(encoded.getvalue()))
    assert (seen == (wide >> 8)[..., None]).all()
    assert isinstance(inspect_image(encoded.getvalue()), ImageFacts)


def test_pixels_of_floating_point_are_refused() -> None:
    encoded = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(encoded, "PPM")
    with pytest.raises(ValueError, match="found floating-point pixels, expected integers"):
        decode_image(encoded.getvalue())


def test_loader_processes_may_be_started_in_any_way(tasks: list[str], clip: Clip) -> None:
    """Spawned and served ones get what they read as a pickle."""
    task = open_task(tasks[0])
    decode = Decoder(clip.train_transform, task.get_label)
    for items in (
        TrainingImages(task.train, decode, 3, 6, range(6)),
        TrainingImages(NoiseSamples((8, 8)), Decoder(clip.evaluation_transform, Sample.identity), 3, 6, range(6)),
        EvaluationImages(task.test, Decoder(clip.evaluation_transform, task.get_label_and_index), 0, 1),
    ):
        images, *_ = next(pickle.loads(pickle.dumps(BatchedDataset(items, 6, items.count)))())
        assert len(images) == 6


def test_a_part_of_a_set_is_judged_by_its_own_size(tmp_path: Path) -> None:
    part = write_samples(tmp_path, {3: b"no image"}).subset(range(10)).reindexed()
    for images in (
        EvaluationImages(part, Decoder(ToTensor(), label_of), 0, 1).iter_batches(4, tolerant_loader(0.05)[0]),
        TrainingImages(part, Decoder(AUGMENT, label_of), 3, 6, range(6)).iter_batches(tolerant_loader(0.05)[0]),
    ):
        with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
            list(islice(images, 8))
        assert "found 1 unusable samples of 10," in str(error.value)


@pytest.mark.parametrize("training", [False, True])
def test_a_small_stream_is_judged_by_its_own_size(training: bool, tmp_path: Path) -> None:
    write_samples(tmp_path, {3: b"no image", 20: b"nor this"})
    samples = open_samples([f"file://{tmp_path}/{{0..2}}.tar"])
    loader, _ = tolerant_loader(0.04)
    if training:
        batches = islice(TrainingImages(samples, Decoder(AUGMENT, label_of), 3, 6, range(6)).iter_batches(loader), 14)
    else:
        batches = EvaluationImages(samples, Decoder(ToTensor(), label_of), 0, 1).iter_batches(4, loader)
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        read_all(batches, loader)
    assert "found 2 unusable samples of 40," in str(error.value)


def read_all(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], loader: Loader) -> None:
    list(batches)
    loader.check_broken_across_ranks()


def read_a_part(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    loader = tolerant_loader(0.04)[0]
    images = EvaluationImages(open_samples([str(folder)]), Decoder(ToTensor(), label_of), rank, 2)
    result = f"{len([n for _, labels in images.iter_batches(4, loader) for n in labels])} images"
    try:
        loader.check_broken_across_ranks()
    except InputError as error:
        result += f"; {error}"
    (folder / f"{rank}.txt").write_text(result)
    dist.destroy_process_group()


def test_two_workers_refuse_what_one_refuses(tmp_path: Path) -> None:
    write_samples(tmp_path, {2: b"no image", 3: b"nor this"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(read_a_part, (port, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("19 images; ")
    assert "found 2 unusable samples of 40, expected at most a fraction of 0.04" in first


def test_what_was_broken_before_an_interruption_counts(tmp_path: Path) -> None:
    samples = write_samples(tmp_path, {3: b"no image"})
    loader, _ = tolerant_loader(0.03)
    loader.restored_broken_samples.append(["another sample"])
    with refused(ErrorCode.BROKEN_SAMPLES, "compute.max_broken_share") as error:
        list(EvaluationImages(samples, Decoder(ToTensor(), label_of), 0, 1).iter_batches(4, loader))
    assert "found 2 unusable samples of 40" in str(error.value)
