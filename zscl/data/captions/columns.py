"""Choice of the caption column of a table or the caption key of JSON, by its name and by the kind of its values."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from schemas.errors import ErrorCode, InputError, did_you_mean

# Names of columns and keys, normalized by `normalize_name`.
CAPTION_NAMES = {
    *("caption", "captions", "text", "texts", "title", "sentence", "sentences", "comment", "comments"),
    *("description", "descriptions", "raw", "alt", "alt_text", "alttext"),
}
OTHER_NAMES = {
    *("", "url", "urls", "link", "image", "images", "image_url", "image_urls", "image_name", "image_id"),
    *("img", "img_id", "imgid", "filepath", "file", "filename", "file_name", "path", "key", "id", "index", "hash"),
    *("sha256", "md5", "width", "height", "split", "license", "similarity", "label", "language", "lang"),
    *("comment_number", "caption_number", "sentid", "sentids"),
}
URL = re.compile(r"([a-z][a-z0-9+]*://|www\.)\S+", re.IGNORECASE)
# A file name may be followed by "#NUMBER", as in Flickr's caption files, and by numeric labels.
IMAGE_FILE = re.compile(r"(\S+|.*/.*)\.(jpe?g|png|webp|gif|bmp|tiff?)(#\d+)?(\s+\d+)*", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?\d[\d.,:eE/+-]*")
IDENTIFIER = re.compile(r"(?=\S*\d)[\w.\-/#]+")
NEVER_CAPTIONS = ("URLs", "file names", "JSON")  # kinds that are never accepted as captions
DOUBTFUL_CAPTIONS = ("numbers", "identifiers")  # kinds that are accepted if the user names the column


def normalize_name(text: str) -> str:
    """Normalize a column's name for comparisons: lower case, underscores for spaces and hyphens, no quotation marks."""
    return re.sub(r"[\s-]+", "_", text.strip().strip("\"'").casefold())


def classify_value(value: str) -> str:
    """Return what a value is: `URLs`, `file names`, `numbers`, `identifiers`, `JSON` or `text`."""
    value = value.strip()
    for pattern, kind in ((URL, "URLs"), (IMAGE_FILE, "file names"), (NUMBER, "numbers"), (IDENTIFIER, "identifiers")):
        if pattern.fullmatch(value):
            return kind
    return "JSON" if re.fullmatch(r"\[.*\]|\{.*\}", value, re.DOTALL) else "text"


def classify_values(values: Sequence[str]) -> str:
    """Return what more than half of the values are, see `classify_value`; `text` if no kind has a majority."""
    kind, count = Counter(map(classify_value, values)).most_common(1)[0] if values else ("text", 1)
    return kind if count > len(values) / 2 else "text"


@dataclass(frozen=True)
class CaptionSource:
    """A caption file and the user's choice of its caption column.

    Attributes:
        location: Path or URL.
        column: Name or number (from 1) of the caption column, or the key in JSON; `None`: it is detected.
        lenient: Whether numbers and identifiers are accepted as captions.
    """

    location: str
    column: str | None
    lenient: bool

    @property
    def column_names(self) -> Collection[str]:
        """The names that the caption column may have, normalized by `normalize_name`."""
        return CAPTION_NAMES if self.column is None else {normalize_name(self.column)}

    def find_column(self, names: Sequence[str], what: str, accepted: Collection[str] = ()) -> str:
        """Find the caption column among the columns of a table, or the caption key among the keys in JSON.

        Args:
            names: Names of all columns or keys.
            what: `columns` or `keys`; used in the error message.
            accepted: The normalized names that the caption column may have; default: `column_names`.

        Returns:
            The name of the caption column or key. A name that equals `column` exactly takes precedence.

        Raises:
            InputError: No name matches, or several names match.
        """
        accepted = accepted or self.column_names
        matches = [name for name in names if name == self.column] or [
            name for name in names if normalize_name(name) in accepted
        ]
        if len(matches) == 1:
            return matches[0]
        hint = did_you_mean(self.column, names) if self.column else ""
        raise InputError(
            f"{self.location}: {len(matches)} of these {what} could hold captions by their names: "
            f"{', '.join(map(repr, names))}, expected exactly one{hint}; {self.advice}",
            code=ErrorCode.UNKNOWN_NAME,
            field="--column",
        )

    def check_is_text(self, values: Sequence[str], where: str) -> None:
        """Check that values of the caption column are text.

        Args:
            values: Some of the values.
            where: Description of the column or key for the error message.

        Raises:
            InputError: More than half of the values are URLs, file names or JSON, or (unless `lenient`) numbers or
                identifiers.
        """
        kind = classify_values([value for value in values if value.strip()])
        if kind in NEVER_CAPTIONS or (kind in DOUBTFUL_CAPTIONS and not self.lenient):
            example = next(value.strip() for value in values if classify_value(value) == kind)
            raise InputError(
                f"{self.location}: found {kind} in {where} ({example[:100]!r}), expected captions; {self.advice}",
                code=ErrorCode.UNSUPPORTED,
            )

    @property
    def advice(self) -> str:
        """Advice at the end of an error message: the command with which the user selects the column."""
        return f"select it with: zscl data prepare captions {self.location} --column NAME_OR_NUMBER --out FOLDER"
