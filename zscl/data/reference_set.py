"""A reference set: unlabelled images and unpaired texts."""

from functools import cached_property
from pathlib import Path

from schemas.data import Reference
from schemas.errors import InputError
from zscl.data.captions.formats import read_captions
from zscl.data.shard_urls import open_samples
from zscl.runtime.hashing import sha256_of


class ReferenceSet:
    """A reference set, opened: unlabelled images and unpaired texts."""

    def __init__(self, reference: Reference, cache: str | None = None) -> None:
        self.images = open_samples(reference.images, cache)
        self.texts = self._texts(reference)[: reference.max_texts]
        if not self.texts:
            raise InputError(
                f"reference: found no texts in {', '.join(reference.images)}, expected .txt members beside the "
                "images, a captions.txt in the folder, or reference.texts: FILE"
            )

    def _texts(self, reference: Reference) -> list[str]:
        if reference.texts is not None:
            return list(read_captions(reference.texts, lenient=True))
        for location in reference.images:
            if "://" not in location and Path(location, "captions.txt").is_file():
                return list(read_captions(f"{location}/captions.txt", lenient=True))
        return [text for text in self.images.texts() if text]

    @cached_property
    def digest(self) -> str:
        """Identity of the set: images by names and sizes, texts by content."""
        return sha256_of(self.images.digest, "\n".join(self.texts))
