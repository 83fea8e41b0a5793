"""A task as it lies on disk: CLIP_benchmark's WebDataset layout, and one file of ours beside it.

<task>/classnames.txt                         one class a line; line number = label
<task>/zeroshot_classification_templates.txt  one template a line, `{c}` for the class name; line 0 trains
<task>/train/nshards.txt, 0.tar, 1.tar, …     samples KEY.(jpg|jpeg|png|webp) + KEY.cls
<task>/test/nshards.txt, 0.tar, …
<task>/zscl.json                              optional: source, split, counts, sizes and SHA-256 of the shards
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import fsspec

from schemas.data import Task
from schemas.errors import InputError, listed
from schemas.experiment import HeldOut
from zscl.data.indexed import IndexedSamples
from zscl.data.sample import BrokenSampleError, Sample, check_broken_share, decode_label, printable_name
from zscl.data.shard_urls import MOST_SHARDS, open_samples
from zscl.data.splits import draw_shots, hold_out
from zscl.data.streaming import StreamedSamples
from zscl.runtime.hashing import sha256_of
from zscl.runtime.paths import did_you_mean_path, is_hidden

MANIFEST = "zscl.json"


def read_text(location: str) -> str | None:
    """Read a small text file, local or remote; `None` where there is none."""
    try:
        # Only \n ends a line: the number of a line may be a label.
        if "://" not in location:
            if Path(location).exists() and not Path(location).is_file():
                raise InputError(f"{location}: found no file but a folder or device, expected a text file")
            # Not through fsspec, which would take `::` in a path for a chain of URLs.
            with Path(location).open(encoding="utf-8-sig", newline="\n") as file:
                return file.read()
        with fsspec.open(location, "rt", encoding="utf-8-sig", newline="\n") as stream:
            return str(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: found no UTF-8 text ({error.reason}), expected a text file in UTF-8") from error
    except Exception as error:  # fsspec raises what its stores raise: no credentials, no such bucket, ...
        raise InputError(f"{location}: cannot be read ({error}), expected a text file") from error


def read_lines(location: str, what: str) -> list[str]:
    """Read a file's lines. Only \\n and \\r\\n end a line: other line separators of Unicode are part of it.

    Raises:
        InputError: there is no such file, it is empty, or it holds NUL bytes.
    """
    text = read_text(location)
    if text is None:
        raise InputError(f"{location}: found no such file, expected {what}, one a line")
    if not text.strip():
        raise InputError(f"{location}: found an empty file, expected {what}, one a line")
    lines = [line.strip() for line in text.rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if "\0" in line or "\r" in line:
            what_ends = "a NUL byte" if "\0" in line else "a carriage return within a line"
            raise InputError(f"{location}: found {what_ends} on line {number}, expected {what}, one a line, in UTF-8")
    return lines


def parse_count(text: str) -> int | None:
    """The number that a text writes in digits, if it is one that may count something."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


@dataclass(frozen=True)
class TaskFolder:
    """A task, opened: its words are read, its shards are found on demand."""

    name: str
    path: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    cache: str | None = None
    classes: tuple[int, ...] | None = None
    whole: "TaskFolder | None" = field(default=None, compare=False)
    held_out: HeldOut | None = None
    shots: int | None = None
    shots_seed: int = 0

    @classmethod
    def open(cls, task: Task, cache: str | None = None, held_out: HeldOut | None = None) -> "TaskFolder":
        """Read a task's class names and templates; remote shards go through `cache`, if any.

        Args:
            task: where, and its name.
            cache: folder for copies of remote shards.
            held_out: the part of the training images that is not trained on.

        Raises:
            InputError: the folder, a file of it or the template's `{c}` is missing.
        """
        if "://" not in task.path and not Path(task.path).is_dir():
            near = did_you_mean_path(Path(task.path))
            raise InputError(f"{task.path}: found no such folder, expected a task (task '{task.name}'){near}")
        if "://" not in task.path and not Path(task.path, "classnames.txt").exists():
            raise InputError(
                f"{task.path}/classnames.txt: found no such file, expected class names, one a line; a folder of images "
                "becomes a task with: zscl data prepare folder"
            )
        classnames = read_lines(f"{task.path}/classnames.txt", "class names")
        if "" in classnames:
            raise InputError(
                f"{task.path}/classnames.txt: found line {classnames.index('') + 1} empty, expected a class name: the "
                "line number is the label"
            )
        file = f"{task.path}/zeroshot_classification_templates.txt"
        templates = [line for line in read_lines(file, "prompt templates") if line]
        for template in templates:
            if "{c}" not in template:
                raise InputError(f"{file}: found the template {template!r}, expected a {{c}} for the class name in it")
        return cls(task.name, task.path, tuple(classnames), tuple(templates), cache, held_out=held_out)

    def prompts(self, template: str) -> list[str]:
        """Every class name in a template, in label order."""
        return [template.replace("{c}", name) for name in self.classnames]

    def subset(self, classes: tuple[int, ...] | None, name: str) -> "TaskFolder":
        """The part of the task that is about some of its labels, renumbered in their order; `None`: all of it.

        Raises:
            InputError: a label is given twice, or is not one of the task's.
        """
        if classes is None:
            return replace(self, name=name)
        for label in classes:
            if label >= len(self.classnames) or classes.count(label) > 1:
                raise InputError(
                    f"{self.path}: found the class {label} in the classes of '{name}', expected each once, of 0 to "
                    f"{len(self.classnames) - 1}"
                )
        names = tuple(self.classnames[label] for label in classes)
        return replace(self, name=name, classnames=names, classes=classes, whole=self)

    @cached_property
    def train(self) -> IndexedSamples | StreamedSamples:
        """The training images."""
        if self.shots is None:
            return self._samples("train")
        return draw_shots(self.without_shots.train, self.shots, self.shots_seed, self.path, self._is_usable)

    @cached_property
    def test(self) -> IndexedSamples | StreamedSamples:
        """The test images."""
        return self._samples("test") if self.shots is None else self.without_shots.test

    @cached_property
    def without_shots(self) -> "TaskFolder":
        """The task with all its training images; its shards are indexed once for both."""
        return self if self.shots is None else replace(self, shots=None)

    def _samples(self, split: str) -> IndexedSamples | StreamedSamples:
        if self.whole is None or self.classes is None:
            left_out = self.held_out is not None and (split == "train" or self.held_out.judged_on == "held_out")
            return self._parts[split] if left_out else self._all_samples(split)
        samples = self.whole.train if split == "train" else self.whole.test
        if not isinstance(samples, IndexedSamples):
            raise InputError(
                f"{self.path}: found remote shards, expected local ones to take some classes from; "
                "compute.shard_cache makes them local"
            )
        wanted = set(self.classes)
        chosen = [place for place, text in enumerate(self.whole.labels[split]) if parse_count(text) in wanted]
        if not chosen:
            raise InputError(f"{self.path}/{split}: found no image of the classes of '{self.name}', expected some")
        return samples.subset(chosen).reindexed()

    def _all_samples(self, split: str) -> IndexedSamples | StreamedSamples:
        return open_samples(self.shards(split), self.cache, as_written=True)

    @cached_property
    def _parts(self) -> dict[str, IndexedSamples]:
        """The training images that are trained on, and those held out of them."""
        assert self.held_out is not None
        samples = self._all_samples("train")
        kept, held = hold_out(samples, self.held_out, self.path, self.classnames)
        return {"train": kept, "test": held}

    @cached_property
    def labels(self) -> dict[str, list[str]]:
        """What the labels of each local split say, in order."""
        return {
            split: [decode_label(sample.label) for sample in samples.labels()] for split, samples in self._local.items()
        }

    def shards(self, split: str) -> list[str]:
        """Locations of a split's shards.

        Raises:
            InputError: nshards.txt is missing, is not a number above 0, or promises a shard that is not there.
        """
        shards = self.promised_shards(split)
        for shard in shards:
            if "://" not in shard and not Path(shard).is_file():
                file = f"{self.path}/{split}/nshards.txt"
                raise InputError(f"{shard}: found no such file, expected {len(shards)} shards as {file} says")
        return shards

    def promised_shards(self, split: str) -> list[str]:
        """Locations of a split's shards as nshards.txt promises them, whether they are there or not.

        Raises:
            InputError: nshards.txt is missing, or is not a number above 0.
        """
        file = f"{self.path}/{split}/nshards.txt"
        [count] = read_lines(file, "the number of shards")[:1]
        shards = parse_count(count)
        if shards is None or not 1 <= shards <= MOST_SHARDS:
            raise InputError(f"{file}: found {count[:40]!r}, expected the number of shards, at least 1")
        return [f"{self.path}/{split}/{index}.tar" for index in range(shards)]

    def warnings(self, split: str) -> list[str]:
        """Sentences about a local split that is read otherwise than it may be meant."""
        sentences = []
        samples = self.train if split == "train" else self.test
        if isinstance(samples, IndexedSamples) and (keys := samples.dotted_keys()):
            sentences.append(dotted_keys_warning(split, keys))
        if shards := self.uncounted_shards(split):
            sentences.append(uncounted_shards_warning(split, shards))
        return sentences

    def uncounted_shards(self, split: str) -> list[Path]:
        """The shards in a local split's folder that nshards.txt does not count: they are never read."""
        if "://" in self.path or not Path(self.path, split, "nshards.txt").is_file():
            return []
        promised = {Path(shard) for shard in self.promised_shards(split)}
        files = Path(self.path, split).iterdir()
        return sorted(
            file for file in files if ".tar" in file.name.lower() and not is_hidden(file.name) and file not in promised
        )

    def label_of(self, sample: Sample) -> int:
        """Read a sample's label.

        Raises:
            BrokenSampleError: the sample cannot be used, or its label is missing or outside the class list.
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
            self.label_of(sample)
        except BrokenSampleError:
            return False
        return True

    def label_and_index_of(self, sample: Sample) -> tuple[int, int]:
        """A sample's label, and its number in its set."""
        return self.label_of(sample), sample.index

    @cached_property
    def broken(self) -> dict[str, list[str]]:
        """Of each local split, a sentence a sample that cannot be used, as far as file names and labels tell."""
        found: dict[str, list[str]] = {}
        for split, samples in self._local.items():
            found[split] = []
            for sample in samples.labels():
                try:
                    self.label_of(sample)
                except BrokenSampleError as error:
                    found[split].append(str(error))
        return found

    @property
    def _local(self) -> dict[str, IndexedSamples]:
        splits = {"train": self.train, "test": self.test}
        return {split: samples for split, samples in splits.items() if isinstance(samples, IndexedSamples)}

    def check(self, max_broken_share: float = 0.0) -> None:
        """Look at every local shard and label before anything starts.

        Args:
            max_broken_share: of a split's samples, that may be unusable.

        Raises:
            InputError: a shard is missing or broken, or too many samples cannot be used.
        """
        for split, samples in self._local.items():
            if broken := self.broken[split]:
                check_broken_share(broken[0], len(broken), len(samples), max_broken_share)

    @cached_property
    def digest(self) -> str:
        """Identity of the task's content: by the manifest's hashes, else by its samples' names, sizes and labels."""
        if self.whole is not None:
            return sha256_of(self.whole.digest, repr(self.classes), "\n".join(self.templates))
        if self.held_out is not None:
            # What the run is judged on has no part in training; the fingerprint counts it.
            return sha256_of(replace(self, held_out=None).digest, self.held_out.model_dump_json(exclude={"judged_on"}))
        words = ["\n".join(self.classnames), "\n".join(self.templates)]
        manifest = read_text(f"{self.path}/{MANIFEST}")
        if manifest is None:
            return sha256_of(*words, self.train.digest, self.test.digest)
        return sha256_of(*words, *self._checked_hashes(manifest))

    @property
    def split_family(self) -> str:
        """How the task's manifest says that train and test were told apart; nothing without one."""
        manifest = read_text(f"{self.path}/{MANIFEST}")
        try:
            return str(json.loads(manifest or "{}").get("split_family", ""))
        except (ValueError, AttributeError):  # none of ours: `digest` refuses it
            return ""

    def _checked_hashes(self, manifest: str) -> list[str]:
        hashes = []
        try:
            splits = json.loads(manifest)["splits"]
            listed = [(split, shard) for split, shards in splits.items() for shard in shards]
            for split, shard in listed:
                name, size, sha256 = shard["file"], shard["bytes"], shard["sha256"]
                file = Path(self.path, split, name)
                if file.exists() and file.stat().st_size != size:
                    raise InputError(
                        f"{file}: found {file.stat().st_size} bytes, expected {size} as {MANIFEST} beside it says "
                        "(delete that file if you changed the shard)"
                    )
                hashes.append(f"{split}/{name} {sha256}")
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise InputError(
                f"{self.path}/{MANIFEST}: found no manifest ({error}), expected zscl's own, or no such file"
            ) from error
        return hashes


def dotted_keys_warning(split: str, keys: Sequence[str]) -> str:
    """A sentence about keys that other readers of such shards cut."""
    found = listed(keys, "sample whose key has a dot", "samples whose keys have dots")
    return (
        f"{split}: found {found}: they are read here up to the last dot, each image as a sample of its own; "
        "WebDataset's own tools cut at the first"
    )


def uncounted_shards_warning(split: str, shards: Sequence[Path]) -> str:
    """A sentence about shards that are there and not counted."""
    found = listed([printable_name(file.name) for file in shards], "shard")
    return f"{split}: found {found} that nshards.txt does not count: never read"
