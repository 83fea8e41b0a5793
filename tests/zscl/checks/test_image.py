"""Inspection of complete and truncated images."""

import io

import pytest
from PIL import Image
from support.data import jpeg

from zscl.checks.image import ImageFacts, inspect_image
from zscl.data.sample import Fault


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_not_accepted(kind: str, cut: float) -> None:
    stream = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(stream, kind)
    complete = stream.getvalue()
    assert isinstance(inspect_image(complete), ImageFacts)
    assert isinstance(inspect_image(complete[: int(len(complete) * cut)]), Fault)
