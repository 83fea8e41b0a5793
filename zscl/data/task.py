"""Task folders in CLIP_benchmark's WebDataset layout: class names, prompt templates, labels, splits and manifest.

<task>/classnames.txt                         one class name per line; line number = label
<task>/zeroshot_classification_templates.txt  one prompt template per line with `{c}`; training uses the first
<task>/train/nshards.txt, 0.tar, 1.tar, …     samples KEY.(jpg|jpeg|png|webp) + KEY.cls
<task>/test/nshards.txt, 0.tar, …
<task>/zscl.json                              optional manifest of ZSCL: source, split, counts, sizes and SHA-256
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from schemas.data import Task
from schemas.errors import ErrorCode, InputError, format_names
from schemas.experiment import HeldOut
from zscl.data.captions.text_file import open_binary
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import BrokenSampleError, Sample, check_broken_share, decode_label, printable_name
from zscl.data.shard_urls import MAX_SHARDS, open_samples
from zscl.data.splits import draw_shots, hold_out
from zscl.data.streaming import StreamedSamples
from zscl.runtime.hashing import sha256_of
from zscl.runtime.paths import did_you_mean_path, is_hidden

MANIFEST = "zscl.json"


def read_text(location: str) -> str | None:
    """Read a small text file, local or remote. Line endings are preserved.

    Args:
        location: Path or URL.

    Returns:
        The text; `None` if there is no such file.

    Raises:
        InputError: The file cannot be read or is not UTF-8 text.
    """
    try:
        if "://" not in location and Path(location).exists() and not Path(location).is_file():
            raise InputError(f"{location}: found a folder or device, expected a text file", code=ErrorCode.UNREADABLE)
        with open_binary(location) as stream:
            return stream.read().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{location}: found no UTF-8 text ({error.reason}), expected a text file in UTF-8",
            code=ErrorCode.UNREADABLE,
        ) from error
    except Exception as error:  # each fsspec backend raises its own classes of error
        raise InputError(
            f"{location}: cannot be read ({error}), expected a text file", code=ErrorCode.UNREADABLE
        ) from error


def read_lines(location: str, content: str) -> list[str]:
    r"""Read the lines of a text file, without surrounding whitespace.

    Only \n and \r\n end a line, because line numbers may be labels. Other line separators of Unicode are preserved.

    Args:
        location: Path or URL.
        content: A plural noun for the lines, for error messages.

    Returns:
        The lines, without blank lines at the end.

    Raises:
        InputError: There is no such file, it is empty, or it contains NUL bytes or single carriage returns.
    """
    text = read_text(location)
    if text is None:
        raise InputError(f"{location}: found no such file, expected {content}, one per line", code=ErrorCode.NOT_FOUND)
    if not text.strip():
        raise InputError(f"{location}: found an empty file, expected {content}, one per line", code=ErrorCode.EMPTY)
    lines = [line.strip() for line in text.rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if "\0" in line or "\r" in line:
            character = "a NUL byte" if "\0" in line else "a carriage return within a line"
            raise InputError(
                f"{location}: found {character} on line {number}, expected {content}, one per line, in UTF-8",
                code=ErrorCode.UNREADABLE,
            )
    return lines


def parse_count(text: str) -> int | None:
    """Parse a text of fewer than 20 ASCII digits to an integer. Return `None` for any other text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


@dataclass(frozen=True)
class TaskFolder:
    """A task: class names, prompt templates, and training and test images. The shards are opened on first use.

    Attributes:
        name: Name of the task.
        path: Path or URL of the folder.
        classnames: Class names in label order.
        templates: Prompt templates; the first one is used for training.
        shard_cache: Folder to which remote shards are downloaded. If `None`, remote shards are streamed.
        classes: The folder's labels of the task's classes, if the task has only some of the folder's classes: label i
            of the task is label `classes[i]` of the folder. `None` if the task has all classes.
        full_task: The task with all classes of the folder, if this task has only some of them; else `None`.
        held_out: Settings of the held-out training images; `None` if no images are held out.
        shots: Maximum number of training images per class, for few-shot training; `None` for all.
        shots_seed: Seed of the random choice of the `shots` images.
    """

    name: str
    path: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    shard_cache: str | None = None
    classes: tuple[int, ...] | None = None
    full_task: "TaskFolder | None" = field(default=None, compare=False)
    held_out: HeldOut | None = None
    shots: int | None = None
    shots_seed: int = 0

    @classmethod
    def open(cls, task: Task, shard_cache: str | None = None, held_out: HeldOut | None = None) -> "TaskFolder":
        """Read a task's class names and templates.

        Args:
            task: The task in the recipe; only its path and name are used.
            shard_cache: Folder to which remote shards are downloaded. If `None`, remote shards are streamed.
            held_out: Settings of the held-out training images; `None` if no images are held out.

        Returns:
            The task with all classes and all training images that are not held out.

        Raises:
            InputError: The folder or one of its files is missing, a class name is empty, or a template has no `{c}`.
        """
        is_local = "://" not in task.path
        if is_local and not Path(task.path).is_dir():
            suggestion = did_you_mean_path(Path(task.path))
            raise InputError(
                f"{task.path}: found no such folder, expected the folder of task '{task.name}'{suggestion}",
                code=ErrorCode.NOT_FOUND,
            )
        if is_local and not Path(task.path, "classnames.txt").exists():
            raise InputError(
                f"{task.path}/classnames.txt: found no such file, expected class names, one per line; to convert a "
                "folder of images to a task, use: zscl data prepare folder",
                code=ErrorCode.NOT_FOUND,
            )
        classnames = read_lines(f"{task.path}/classnames.txt", "class names")
        if "" in classnames:
            raise InputError(
                f"{task.path}/classnames.txt: line {classnames.index('') + 1} is empty, expected a class name, because "
                "line numbers are labels",
                code=ErrorCode.INVALID_VALUE,
            )
        file = f"{task.path}/zeroshot_classification_templates.txt"
        templates = [line for line in read_lines(file, "prompt templates") if line]
        for template in templates:
            if "{c}" not in template:
                raise InputError(
                    f"{file}: found the template {template!r}, expected one with {{c}} for the class name",
                    code=ErrorCode.INVALID_VALUE,
                )
        return cls(task.name, task.path, tuple(classnames), tuple(templates), shard_cache, held_out=held_out)

    def prompts(self, template: str) -> list[str]:
        """Fill the template with every class name, in label order."""
        return [template.replace("{c}", name) for name in self.classnames]

    def subset(self, classes: tuple[int, ...] | None, name: str) -> "TaskFolder":
        """Return a task with some of the classes. Its labels are numbered from 0 in the order of `classes`.

        Args:
            classes: This task's labels of the classes to select; `None` for all.
            name: Name of the new task.

        Returns:
            The new task.

        Raises:
            InputError: A label is repeated or out of range.
        """
        if classes is None:
            return replace(self, name=name)
        for label in classes:
            if label >= len(self.classnames) or classes.count(label) > 1:
                raise InputError(
                    f"{self.path}: found the label {label} in the classes of '{name}', expected different labels from "
                    f"0 to {len(self.classnames) - 1}",
                    code=ErrorCode.INVALID_VALUE,
                    field="tasks.classes",
                )
        names = tuple(self.classnames[label] for label in classes)
        return replace(self, name=name, classnames=names, classes=classes, full_task=self)

    @cached_property
    def train(self) -> IndexedSamples | StreamedSamples:
        """The training images without the held-out images; at most `shots` images per class."""
        if self.shots is None:
            return self._load_split("train")
        return draw_shots(self.without_shots.train, self.shots, self.shots_seed, self.path, self._is_usable)

    @cached_property
    def test(self) -> IndexedSamples | StreamedSamples:
        """The test images, or the held-out images if the run is evaluated on them."""
        return self._load_split("test") if self.shots is None else self.without_shots.test

    @cached_property
    def without_shots(self) -> "TaskFolder":
        """The same task with `shots=None`. It is cached, so that its shards are indexed only once."""
        return self if self.shots is None else replace(self, shots=None)

    def _load_split(self, split: str) -> IndexedSamples | StreamedSamples:
        if self.full_task is None or self.classes is None:
            is_divided = self.held_out is not None and (split == "train" or self.held_out.judged_on == "held_out")
            return self._divided_splits[split] if is_divided else self._open_split(split)
        samples = self.full_task.train if split == "train" else self.full_task.test
        if not isinstance(samples, IndexedSamples):
            raise InputError(
                f"{self.path}: found remote shards, expected local shards to select some of the classes; to download "
                "them, set compute.shard_cache",
                code=ErrorCode.UNSUPPORTED,
            )
        labels = set(self.classes)
        positions = [
            position for position, text in enumerate(self.full_task.label_texts[split]) if parse_count(text) in labels
        ]
        if not positions:
            raise InputError(
                f"{self.path}/{split}: found no image of the classes of '{self.name}', expected at least one",
                code=ErrorCode.EMPTY,
            )
        return samples.subset(positions).reindexed()

    def _open_split(self, split: str) -> IndexedSamples | StreamedSamples:
        return open_samples(self.list_shards(split), self.shard_cache, literal=True)

    @cached_property
    def _divided_splits(self) -> dict[str, IndexedSamples]:
        """The training images that are not held out as `train`, and the held-out images as `test`."""
        assert self.held_out is not None
        train, held = hold_out(self._open_split("train"), self.held_out, self.path, self.classnames)
        return {"train": train, "test": held}

    @cached_property
    def label_texts(self) -> dict[str, list[str]]:
        """The content of the .cls members of all samples, in order, for each split whose shards are local."""
        return {
            split: [decode_label(sample.label) for sample in samples.iter_labels()]
            for split, samples in self._local_splits.items()
        }

    def list_shards(self, split: str) -> list[str]:
        """List the shards of a split, and check that local shards exist.

        Args:
            split: `train` or `test`.

        Returns:
            Paths or URLs of the shards.

        Raises:
            InputError: nshards.txt is missing or is not a positive number, or a shard is missing.
        """
        shards = self.list_expected_shards(split)
        for shard in shards:
            if "://" not in shard and not Path(shard).is_file():
                file = f"{self.path}/{split}/nshards.txt"
                raise InputError(
                    f"{shard}: found no such file, expected {len(shards)} shards according to {file}",
                    code=ErrorCode.NOT_FOUND,
                )
        return shards

    def list_expected_shards(self, split: str) -> list[str]:
        """List the shards that a split has according to nshards.txt, whether they exist or not.

        Args:
            split: `train` or `test`.

        Returns:
            Paths or URLs of the shards.

        Raises:
            InputError: nshards.txt is missing, or is not a positive number.
        """
        file = f"{self.path}/{split}/nshards.txt"
        [text] = read_lines(file, "the number of shards")[:1]
        count = parse_count(text)
        if count is None or not 1 <= count <= MAX_SHARDS:
            raise InputError(
                f"{file}: found {text[:40]!r}, expected the number of shards, at least 1", code=ErrorCode.INVALID_VALUE
            )
        return [f"{self.path}/{split}/{index}.tar" for index in range(count)]

    def list_warnings(self, split: str) -> list[str]:
        """Return warnings about a split: keys that contain a dot, and shards beyond the number in nshards.txt."""
        warnings = []
        samples = self.train if split == "train" else self.test
        if isinstance(samples, IndexedSamples) and (keys := samples.find_dotted_keys()):
            warnings.append(describe_dotted_keys(split, keys))
        if shards := self.find_extra_shards(split):
            warnings.append(describe_extra_shards(split, shards))
        return warnings

    def find_extra_shards(self, split: str) -> list[Path]:
        """Return the shards in a local split's folder that nshards.txt does not count. They are never read."""
        if "://" in self.path or not Path(self.path, split, "nshards.txt").is_file():
            return []
        expected = {Path(shard) for shard in self.list_expected_shards(split)}
        files = Path(self.path, split).iterdir()
        return sorted(
            file for file in files if ".tar" in file.name.lower() and not is_hidden(file.name) and file not in expected
        )

    def get_label(self, sample: Sample) -> int:
        """Parse a sample's label.

        Args:
            sample: A sample of this task.

        Returns:
            The index into `classnames`.

        Raises:
            BrokenSampleError: The sample has a fault, or its label is missing or is not a label of the task.
        """
        sample.check()
        if sample.label is None:
            raise BrokenSampleError(
                f"{sample.shard}: sample '{sample.key}' has no .cls member, expected its label in {sample.key}.cls"
            )
        text = decode_label(sample.label)
        number = parse_count(text)
        if number is not None and self.classes is not None and number in self.classes:
            return self.classes.index(number)
        if number is None or number >= len(self.classnames):
            raise BrokenSampleError(
                f"{sample.shard}: sample '{sample.key}' has the label {text[:40]!r}, "
                f"expected 0 to {len(self.classnames) - 1} ({self.path}/classnames.txt)"
            )
        return number

    def _is_usable(self, sample: Sample) -> bool:
        try:
            self.get_label(sample)
        except BrokenSampleError:
            return False
        return True

    def get_label_and_index(self, sample: Sample) -> tuple[int, int]:
        """Return a sample's label and its index in the dataset."""
        return self.get_label(sample), sample.index

    @cached_property
    def broken_samples(self) -> dict[str, list[str]]:
        """Messages about samples whose file names or labels make them unusable, for each split with local shards."""
        messages: dict[str, list[str]] = {}
        for split, samples in self._local_splits.items():
            messages[split] = []
            for sample in samples.iter_labels():
                try:
                    self.get_label(sample)
                except BrokenSampleError as error:
                    messages[split].append(str(error))
        return messages

    @property
    def _local_splits(self) -> dict[str, IndexedSamples]:
        splits = {"train": self.train, "test": self.test}
        return {split: samples for split, samples in splits.items() if isinstance(samples, IndexedSamples)}

    def check(self, max_broken_share: float = 0.0) -> None:
        """Check all local shards and labels.

        Args:
            max_broken_share: Largest accepted fraction of unusable samples in a split.

        Raises:
            InputError: A shard is missing or damaged, or too many samples are unusable.
        """
        for split, samples in self._local_splits.items():
            if broken := self.broken_samples[split]:
                check_broken_share(broken[0], len(broken), len(samples), max_broken_share)

    @cached_property
    def digest(self) -> str:
        """Hash of class names, templates and images.

        Images are represented by the SHA-256 of each shard in the manifest. Without a manifest, they are represented by
        the names, sizes and labels of the samples.
        """
        if self.full_task is not None:
            return sha256_of(self.full_task.digest, repr(self.classes), "\n".join(self.templates))
        if self.held_out is not None:
            # `judged_on` does not affect training. It is part of the run's fingerprint instead.
            return sha256_of(replace(self, held_out=None).digest, self.held_out.model_dump_json(exclude={"judged_on"}))
        texts = ["\n".join(self.classnames), "\n".join(self.templates)]
        manifest = read_text(f"{self.path}/{MANIFEST}")
        if manifest is None:
            return sha256_of(*texts, self.train.digest, self.test.digest)
        return sha256_of(*texts, *self._read_manifest_hashes(manifest))

    @property
    def split_family(self) -> str:
        """How the data was split into train and test, according to the manifest; empty without a manifest."""
        manifest = read_text(f"{self.path}/{MANIFEST}")
        try:
            return str(json.loads(manifest or "{}").get("split_family", ""))
        except (ValueError, AttributeError):  # an invalid manifest, which `digest` reports
            return ""

    def _read_manifest_hashes(self, manifest: str) -> list[str]:
        """Return the name and SHA-256 of each shard in the manifest, and check the sizes of local shards."""
        hashes = []
        try:
            splits = json.loads(manifest)["splits"]
            entries = [(split, shard) for split, shards in splits.items() for shard in shards]
            for split, shard in entries:
                name, size, sha256 = shard["file"], shard["bytes"], shard["sha256"]
                file = Path(self.path, split, name)
                if file.exists() and file.stat().st_size != size:
                    raise InputError(
                        f"{file}: found {file.stat().st_size} bytes, expected {size} according to {MANIFEST} "
                        "(delete that file if you changed the shard)",
                        code=ErrorCode.MISMATCH,
                    )
                hashes.append(f"{split}/{name} {sha256}")
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise InputError(
                f"{self.path}/{MANIFEST}: found an invalid manifest ({error}), expected zscl's own, or no such file",
                code=ErrorCode.UNREADABLE,
            ) from error
        return hashes


def describe_dotted_keys(split: str, keys: Sequence[str]) -> str:
    """Format a warning about keys with dots, which other WebDataset readers truncate at the first dot."""
    samples = format_names(keys, "sample whose key has a dot", "samples whose keys have dots")
    return (
        f"{split}: found {samples}. Here a key ends at the last dot, so every image is a separate sample; in other "
        "WebDataset tools it ends at the first dot"
    )


def describe_extra_shards(split: str, shards: Sequence[Path]) -> str:
    """Format a warning about shards that are not read, because they are beyond the number in nshards.txt."""
    names = format_names([printable_name(file.name) for file in shards], "shard")
    return f"{split}: found {names} beyond the number in nshards.txt; extra shards are never read"
