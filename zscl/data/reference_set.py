"""Reference sets for distillation: unlabelled images and unpaired texts."""

from functools import cached_property
from pathlib import Path

from schemas.data import Reference
from schemas.errors import ErrorCode, InputError
from zscl.data.captions.formats import read_captions
from zscl.data.shard_urls import open_samples
from zscl.runtime.hashing import sha256_of


class ReferenceSet:
    """The images and texts of a reference set for distillation.

    Attributes:
        images: The unlabelled images.
        texts: The first `reference.max_texts` texts.
    """

    def __init__(self, reference: Reference, shard_cache: str | None = None) -> None:
        """Open the images and read the texts.

        Args:
            reference: The recipe's section `reference`: locations of the images and texts.
            shard_cache: Folder to which remote shards are downloaded. If `None`, remote shards are streamed.

        Raises:
            InputError: The images or texts cannot be read, or there are none.
        """
        self.images = open_samples(reference.images, shard_cache)
        self.texts = self._read_texts(reference)[: reference.max_texts]
        if not self.texts:
            raise InputError(
                f"reference: found no texts in {', '.join(reference.images)}, expected .txt members next to the "
                "images, a captions.txt in their folder, or reference.texts: FILE",
                code=ErrorCode.EMPTY,
                field="reference.texts",
            )

    def _read_texts(self, reference: Reference) -> list[str]:
        """Read `reference.texts`, or else captions.txt in the folder of the images, or else the .txt members."""
        if reference.texts is not None:
            return list(read_captions(reference.texts, lenient=True))
        for location in reference.images:
            if "://" not in location and Path(location, "captions.txt").is_file():
                return list(read_captions(f"{location}/captions.txt", lenient=True))
        return [text for text in self.images.iter_texts() if text]

    @cached_property
    def digest(self) -> str:
        """Hash of the images' names and sizes, and of the texts' content."""
        return sha256_of(self.images.digest, "\n".join(self.texts))
