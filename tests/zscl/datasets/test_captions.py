"""The texts of a reference set from caption files."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.data import coloured_images
from support.errors import refused

from schemas.data import Reference
from schemas.errors import ErrorCode
from zscl.data.reference_set import ReferenceSet
from zscl.datasets.captions import write_captions


def test_captions_are_kept_as_they_are(tmp_path: Path) -> None:
    content = "a dog\thttp://one\n\n a dog \thttp://two\r\ntwo\u2028lines\thttp://three\n\thttp://four\nno address\n"
    (tmp_path / "Validation.tsv").write_bytes(content.encode())
    written = write_captions(tmp_path / "Validation.tsv", tmp_path / "set")
    assert (written.captions, written.empty, written.first) == (4, 1, ("a dog", "a dog", "two lines"))
    assert (tmp_path / "set/captions.txt").read_text() == "a dog\na dog\ntwo lines\nno address\n"
    assert write_captions(tmp_path / "Validation.tsv", tmp_path / "set") == written
    (tmp_path / "other.txt").write_text("a cat\n")
    with refused(ErrorCode.MISMATCH):
        write_captions(tmp_path / "other.txt", tmp_path / "set")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, ErrorCode.NOT_FOUND),
        (b"\n \n", ErrorCode.EMPTY),
        ("ü".encode("latin-1"), ErrorCode.UNREADABLE),
    ],
)
def test_an_unusable_caption_file_is_refused(content: bytes | None, code: ErrorCode, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "captions.tsv").write_bytes(content)
    with refused(code) as error:
        write_captions(tmp_path / "captions.tsv", tmp_path / "set")
    assert "captions.tsv" in str(error.value)
    assert not (tmp_path / "set").exists()


def test_a_tree_of_imagenet_is_a_reference_set(tmp_path: Path) -> None:
    for seed, wnid in enumerate(("n01440764", "n01443537")):
        for number, (image, _) in enumerate(coloured_images(3, seed)):
            (tmp_path / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(image)
    (tmp_path / "captions.tsv").write_text("one\thttp://a\ntwo\thttp://b\n")
    write_captions(tmp_path / "captions.tsv", tmp_path / "train")
    reference = ReferenceSet(Reference.model_validate(str(tmp_path / "train")))
    assert len(list(reference.images.iter_shard(0, 1))) == 6
    assert reference.texts == ["one", "two"]


MAT, FOG = "a cat, on a mat", "a dog in fog"
CSV = f'1.jpg,"{MAT}"\n2.jpg,{FOG}\n'


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("plain.txt", f"{MAT}\n{FOG}\n", None),
        ("plain.txt", f"\ufeff{MAT}\r\n\r\n{FOG}", None),
        ("header.txt", f"caption\n{MAT}\n{FOG}\n", None),
        ("cc3m.tsv", f"{MAT}\thttp://a/1.jpg\n{FOG}\thttp://a/2\n", None),
        ("cc12m.tsv", f"http://a/1.jpg\t{MAT}\nhttp://a/2.jpg\t{FOG}\n", None),
        ("cc3m-header.tsv", f"caption\turl\n{MAT}\thttp://a/1.jpg\n{FOG}\thttp://a/2.jpg\n", None),
        ("one-row.tsv", f"title\tfilepath\n{MAT}\tval/1/1.jpg\n{FOG}\tval/1/2.jpg\n", None),
        ("openclip.csv", f"filepath\ttitle\nimg/1.jpg\t{MAT}\nimg/2.jpg\t{FOG}\n", None),
        ("other-words.tsv", f"Bild\tBeschreibung\nimg/1.jpg\t{MAT}\nimg/2.jpg\t{FOG}\n", None),
        ("flickr.csv", f"image,caption\n{CSV}", None),
        ("flickr.txt", f"image,caption\n{CSV}", None),
        ("headless.csv", CSV, None),
        ("headless.txt", CSV, None),
        ("laion.csv", f'URL,TEXT\nhttp://a/1,"{MAT}"\nhttp://a/2,{FOG}\n', None),
        ("lines.csv", 'image,caption\n1.jpg,"a cat, on\na mat"\n2.jpg,a dog in fog\n', None),
        ("one-column.csv", f'caption\n"{MAT}"\n{FOG}\n', None),
        ("token.txt", f"1.jpg#0\t{MAT}\n1.jpg#1\t{FOG}\n", None),
        ("bars.csv", f"image_name| comment_number| comment\n1.jpg| 0| {MAT}\n1.jpg| 1| {FOG}\n", None),
        ("semicolons.csv", f"file;caption\n1.jpg;{MAT}\n2.jpg;{FOG}\n", None),
        ("labels.tsv", f"train\t{MAT}\ntest\t{FOG}\n", None),
        ("two-texts.tsv", f"title\tcaption\na title here\t{MAT}\na title there\t{FOG}\n", "caption"),
        ("two-texts.tsv", f"title\tcaption\na title here\t{MAT}\na title there\t{FOG}\n", "2"),
        ("headless.tsv", f"a title here\t{MAT}\na title there\t{FOG}\n", "2"),
        ("wit.tsv", f"page_url\tcaption_reference_description\nhttp://a\t{MAT}\nhttp://b\t{FOG}\n", None),
        ("coco.json", {"images": [{"url": "http://a"}], "annotations": [{"caption": MAT}, {"caption": FOG}]}, None),
        ("karpathy.json", {"images": [{"id": 1, "sentences": [{"tokens": ["a"], "raw": MAT}, {"raw": FOG}]}]}, None),
        ("list.json", [MAT, FOG], None),
        ("records.json", [{"url": "http://a", "caption": MAT}, {"url": "http://b", "caption": FOG}], None),
        ("mapping.json", {"1.jpg": [MAT], "2.jpg": [FOG]}, None),
        ("mapping.json", {"1.jpg": MAT, "2.jpg": FOG}, None),
        ("columns.json", {"image_urls": ["http://a", "http://b"], "captions": [MAT, FOG]}, None),
        ("textcaps.json", {"data": [{"caption_str": MAT}, {"caption_str": FOG}]}, "caption_str"),
        ("img2dataset.jsonl", f'{{"caption": "{MAT}", "url": "u"}}\n{{"caption": "{FOG}", "url": "v"}}\n', None),
        ("no-suffix", f'{{"text": "{MAT}"}}\n{{"text": "{FOG}"}}\n', None),
        ("strings.jsonl", f'"{MAT}"\n"{FOG}"\n', None),
    ],
)  # fmt: skip
def test_the_caption_column_is_found_in_any_format(name: str, content: Any, column: str | None, tmp_path: Path) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    file = tmp_path / name
    file.write_bytes(text.encode())
    written = write_captions(file, tmp_path / "set", column)
    assert (tmp_path / "set/captions.txt").read_text() == f"{MAT}\n{FOG}\n"
    assert (written.captions, written.first) == (2, (MAT, FOG))
    if not isinstance(content, str):  # written over several lines
        file.write_text(json.dumps(content, indent=1))
        write_captions(file, tmp_path / "indented", column)
        assert (tmp_path / "indented/captions.txt").read_text() == f"{MAT}\n{FOG}\n"
    if column is None:  # read as it is, too
        texts = Reference.model_validate({"images": images(tmp_path), "texts": str(file)})
        assert ReferenceSet(texts).texts == [MAT, FOG]


def images(folder: Path) -> str:
    """A folder with one image."""
    (folder / "images").mkdir()
    (folder / "images/1.png").write_bytes(next(coloured_images(1, 0))[0])
    return str(folder / "images")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_captions_are_read(compress: Any, tmp_path: Path) -> None:
    packed = compress(f"{MAT}\thttp://a\n{FOG}\thttp://b\n".encode())
    (tmp_path / "captions.tsv.gz").write_bytes(packed)
    assert write_captions(tmp_path / "captions.tsv.gz", tmp_path / "set").first == (MAT, FOG)
    (tmp_path / "cut.tsv.gz").write_bytes(packed[:-6])
    with refused(ErrorCode.UNREADABLE) as error:
        write_captions(tmp_path / "cut.tsv.gz", tmp_path / "other")
    assert "cut.tsv.gz" in str(error.value)


def test_separators_within_a_caption_become_spaces(tmp_path: Path) -> None:
    odd = "one\u2028two\x85three\x0bfour\x0cfive\u2029six\x1cseven"
    (tmp_path / "captions.json").write_text(json.dumps([odd, "tab\tand\nline", "nul\0 and half\ud800"]))
    write_captions(tmp_path / "captions.json", tmp_path / "set")
    lines = "one two three four five six seven", "tab and line", "nul  and half\ufffd"
    assert (tmp_path / "set/captions.txt").read_text().split("\n") == [*lines, ""]
    (tmp_path / "captions.txt").write_text(f"{odd}\nanother one\n")
    assert write_captions(tmp_path / "captions.txt", tmp_path / "plain").captions == 2


def test_quotation_marks_in_tables_of_tabs(tmp_path: Path) -> None:
    (tmp_path / "plain.tsv").write_text('"hello" said the dog\thttp://a\n6" nails\thttp://b\n"quoted"\thttp://c\n')
    assert write_captions(tmp_path / "plain.tsv", tmp_path / "plain").first == (
        '"hello" said the dog',
        '6" nails',
        '"quoted"',
    )
    (tmp_path / "csv.tsv").write_text('caption\turl\n"a ""big"" dog"\thttp://a\n"two\nlines"\thttp://b\n')
    assert write_captions(tmp_path / "csv.tsv", tmp_path / "csv").first == ('a "big" dog', "two lines")


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        made.addfile(tarfile.TarInfo("0.txt"))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "code", "fragment"),
    [
        ("urls.txt", b"http://a/1.jpg\nhttp://a/2.jpg\n", ErrorCode.UNSUPPORTED, "found URLs in its lines"),
        ("files.txt", b"val/1/1.jpg\nval/1/2.jpg\n", ErrorCode.UNSUPPORTED, "found file names in its lines"),
        ("labels.txt", b"a/1.JPEG 0\na/2.JPEG 1\n", ErrorCode.UNSUPPORTED, "found file names in its lines"),
        ("mac.txt", b"a cat\ra dog\r", ErrorCode.UNREADABLE, "carriage return"),
        ("numbers.txt", b"1\n2\n3\n", ErrorCode.UNSUPPORTED, "found numbers in its lines"),
        ("ids.tsv", b"n01440764\t12\nn01443537\t13\n", ErrorCode.MISSING_VALUE, "0 of 2 columns"),
        (
            "two.tsv",
            b"a title\ta caption here\nmore of it\tand of it\n",
            ErrorCode.MISSING_VALUE,
            "(1: 'a title'; 2: 'a cap",
        ),
        ("named.tsv", b"title\tcaption\tn\na b\tc d\t1\n", ErrorCode.UNKNOWN_NAME, "2 of these columns"),
        ("lists.csv", b'url,raw\nhttp://a,"[""a cat"", ""a mat""]"\n', ErrorCode.UNSUPPORTED, "found JSON in column 2"),
        (
            "urls.csv",
            b"image,caption\n1.jpg,http://a/1\n2.jpg,http://a/2\n",
            ErrorCode.UNSUPPORTED,
            "found URLs in column 2 of 2",
        ),
        (
            "commas.csv",
            b"image,caption\n1.jpg,a cat, on a mat\n",
            ErrorCode.UNREADABLE,
            "found 3 columns on line 2, expected 2",
        ),
        ("open.csv", b'image,caption\n1.jpg,"a cat\n2.jpg,a dog\n', ErrorCode.UNREADABLE, "row on line 3"),
        (
            "short.csv",
            b"image,caption\n1.jpg,a cat\n2.jpg\n",
            ErrorCode.UNREADABLE,
            "found 1 columns on line 3, expected 2",
        ),
        ("bad.jsonl", b'{"caption": "a cat"}\n{"caption": \n', ErrorCode.UNREADABLE, "JSON object on line 2"),
        ("bad.json", b'{"caption": "a cat"', ErrorCode.UNREADABLE, "readable JSON"),
        ("keys.json", b'[{"name": "a cat"}]', ErrorCode.UNKNOWN_NAME, "'name'"),
        ("numbers.json", b'[{"caption": 3}]', ErrorCode.INVALID_VALUE, "found 3 as a caption"),
        (
            "lists.json",
            b'{"a": [{"caption": "x y"}], "b": [{"caption": "x y"}]}',
            ErrorCode.MISSING_VALUE,
            "found 2 lists",
        ),
        ("nul.txt", b"a cat\na d\0g\n", ErrorCode.UNREADABLE, "NUL byte on line 2"),
        ("utf16.txt", "a cat".encode("utf-16"), ErrorCode.UNSUPPORTED, "UTF-16"),
        ("part.parquet", b"PAR1....", ErrorCode.UNSUPPORTED, "Parquet"),
        ("captions.zip", b"PK\x03\x04....", ErrorCode.UNSUPPORTED, "zip"),
        ("0.tar", tar(), ErrorCode.UNSUPPORTED, "found a tar"),
    ],
)
def test_doubtful_captions_are_refused(
    name: str, content: bytes, code: ErrorCode, fragment: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(code) as error:
        write_captions(tmp_path / name, tmp_path / "set")
    assert fragment in str(error.value)
    assert not (tmp_path / "set/captions.txt").exists()


def test_a_column_that_is_named_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "two.tsv").write_text("title\tcaption\na b\tc d\n")
    with refused(ErrorCode.UNKNOWN_NAME, "--column") as error:
        write_captions(tmp_path / "two.tsv", tmp_path / "set", "captoin")
    assert "did you mean 'caption'" in str(error.value)
    with refused(ErrorCode.INVALID_VALUE, "--column"):
        write_captions(tmp_path / "two.tsv", tmp_path / "set", "3")
    (tmp_path / "numbers.txt").write_text("7\n8\n")
    assert write_captions(tmp_path / "numbers.txt", tmp_path / "set", "1").captions == 2
    with refused(ErrorCode.NOT_FOUND) as error:
        write_captions(tmp_path, tmp_path / "other")
    assert "found a folder" in str(error.value)


def test_the_column_of_captions_next_to_images_is_detected(tmp_path: Path) -> None:
    folder = Path(images(tmp_path))
    (folder / "captions.txt").write_text("image,caption\n1_ab.jpg,A child in a dress .\n")
    assert ReferenceSet(Reference.model_validate(str(folder))).texts == ["A child in a dress ."]
    (folder / "captions.txt").write_text("http://a/1.jpg\nhttp://a/2.jpg\n")
    with refused(ErrorCode.UNSUPPORTED) as error:
        ReferenceSet(Reference.model_validate(str(folder)))
    assert "URLs" in str(error.value)


def test_captions_below_a_path_with_colons_are_read(tmp_path: Path) -> None:
    (tmp_path / "a::b").mkdir()
    folder = Path(images(tmp_path / "a::b"))
    (folder / "captions.txt").write_text("one\ntwo\n")
    assert ReferenceSet(Reference.model_validate(str(folder))).texts == ["one", "two"]
    with gzip.open(tmp_path / "a::b/more.txt.gz", "wt") as stream:
        stream.write("three\n")
    assert write_captions(tmp_path / "a::b/more.txt.gz", tmp_path / "a::b/set").first == ("three",)


@pytest.mark.parametrize(
    "captions",
    [
        *(["title", "a dog"], ["Text", "a dog"], ["description"], ["caption", "caption", "a dog"]),
        *(['{"caption": "a"}', "a dog"], ['["a"]', "a dog", "b"], ["[", "a dog"], ['"a dog"', "a cat"], ["{", "b"]),
        *(["text, dog", "a, b"], ["text|id", "a|b"], ["a dog, 1.jpg", "a cat, 2.jpg"], ["http://a b", "a dog"]),
        *(["7", "8", "9"], ["a1", "b2"], ["\ufeffa", "b"], ["a dog"]),
    ],
)
def test_prepared_captions_are_read_back_as_they_were_written(captions: list[str], tmp_path: Path) -> None:
    folder = Path(images(tmp_path))
    (tmp_path / "source.json").write_text(json.dumps([{"caption": caption} for caption in ["", *captions]]))
    written = write_captions(tmp_path / "source.json", folder, "caption")
    assert ReferenceSet(Reference.model_validate(str(folder))).texts == captions
    assert write_captions(tmp_path / "source.json", folder, "caption") == written


def test_captions_that_a_run_would_refuse_are_refused_when_they_are_written(tmp_path: Path) -> None:
    records = [["a/b\nc.jpg", "d/e\nf.jpg"]] * 2000  # on one line, they look like file names
    (tmp_path / "source.json").write_text(json.dumps(records))
    with refused(ErrorCode.UNSUPPORTED) as error:
        write_captions(tmp_path / "source.json", tmp_path / "set")
    assert "a run cannot read the resulting" in str(error.value)
    assert not list((tmp_path / "set").iterdir())
