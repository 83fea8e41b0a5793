"""The texts of a reference set from caption files."""

from pathlib import Path

import pytest
from conftest import coloured

from schemas.base import InputError
from schemas.data import Reference
from zscl.captions import write_captions
from zscl.tasks import ReferenceSet


def test_captions_are_kept_as_they_are(tmp_path: Path) -> None:
    content = "a dog\thttp://one\n\n a dog \thttp://two\r\ntwo\u2028lines\thttp://three\n\thttp://four\nno address\n"
    (tmp_path / "Validation.tsv").write_bytes(content.encode())
    assert write_captions(tmp_path / "Validation.tsv", tmp_path / "set") == 4
    assert (tmp_path / "set/captions.txt").read_text() == "a dog\na dog\ntwo lines\nno address\n"
    assert write_captions(tmp_path / "Validation.tsv", tmp_path / "set") == 4
    (tmp_path / "other.txt").write_text("a cat\n")
    with pytest.raises(InputError, match=r"captions\.txt: found other captions there"):
        write_captions(tmp_path / "other.txt", tmp_path / "set")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "found no such file"), (b"\n \n", "found no caption"), ("ü".encode("latin-1"), "found no UTF-8 text")],
)
def test_names_what_a_caption_file_lacks(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "captions.tsv").write_bytes(content)
    with pytest.raises(InputError, match=rf"captions\.tsv: {sentence}"):
        write_captions(tmp_path / "captions.tsv", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_tree_of_imagenet_is_a_reference_set(tmp_path: Path) -> None:
    for seed, wnid in enumerate(("n01440764", "n01443537")):
        for number, (image, _) in enumerate(coloured(3, seed)):
            (tmp_path / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(image)
    (tmp_path / "captions.tsv").write_text("one\thttp://a\ntwo\thttp://b\n")
    write_captions(tmp_path / "captions.tsv", tmp_path / "train")
    reference = ReferenceSet(Reference.model_validate(str(tmp_path / "train")))
    assert len(list(reference.images.once(0, 1))) == 6
    assert reference.texts == ["one", "two"]
