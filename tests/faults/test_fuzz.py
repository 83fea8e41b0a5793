"""Fuzz tests with malformed recipes and shards: every case must be accepted or raise a clear `InputError`.

Every case is generated from its number, so the number in a failure is enough to reproduce it. A few cases run with the
other tests, and all cases run with `make faults`.
"""

import base64
import copy
import gzip
import io
import pickle
import random
import signal
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from orchestrate.recipes import recipe as recipes
from orchestrate.recipes.variants import load_variants
from schemas.data import Task
from schemas.errors import InputError
from zscl.data.decode import Decoder
from zscl.data.indexed import IndexedSamples
from zscl.data.loader import EvaluationImages, TrainingImages
from zscl.data.sample import Samples
from zscl.data.streaming import StreamedSamples
from zscl.data.task import TaskFolder
from zscl.sequence.resolve import resolve

RECIPES, SHARDS = 4_000, 600
AT_ONCE = {"recipes": 200, "shards": 40}  # cases per test; only the first test of each kind is not marked `faults`
SECONDS = 20.0  # time limit of one case on a busy machine
SHOWN = 10


class HangError(BaseException):
    """Raised when a case exceeds its time limit. It is no `Exception`, so that no library can catch it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Context manager: raise `HangError` after a time limit.

    pytest-timeout uses the same process timer, so its remaining time is restored afterwards.
    """

    def interrupt(*_: object) -> None:
        raise HangError

    handler = signal.signal(signal.SIGALRM, interrupt)
    started, (before, _) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        left = before - (time.monotonic() - started)
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.001) if before else 0.0)


def parts(kind: str, count: int) -> list[Any]:
    size = AT_ONCE[kind]
    return [
        pytest.param(range(start, start + size), id=str(start), marks=[] if start == 0 else [pytest.mark.faults])
        for start in range(0, count, size)
    ]


def judge(numbers: range, case: Callable[[int], str | None]) -> None:
    """Run cases, and fail with a list of those that return a problem, raise an exception or take too long."""
    wrong = []
    for number in numbers:
        try:
            with limited(SECONDS):
                problem = case(number)
        except HangError:
            problem = f"took longer than {SECONDS:.0f} s"
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        if problem:
            wrong.append(f"case {number}: {problem}")
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong[:SHOWN])


def sentence_of(error: InputError, *names: str) -> str | None:
    """Return what is wrong with an error message, which must contain one of the names and no traceback."""
    sentence = str(error)
    if not any(name in sentence for name in names):
        return f"names none of {names}: {sentence[:300]!r}"
    if len(sentence) > 20_000 or "Traceback" in sentence:
        return f"is no sentence: {sentence[:300]!r}"
    return None


# ---------------------------------------------------------------------------------------------------- recipes

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**30, -(10**30), 10**4000, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
    "", " ", "0", "16", "1e-3", "yes", "null", "nan", "\x00", "a\x00b", "\x1b[31mred", "line\nline", "é", "\u202e",
    "x" * 300, "x" * 5_000, "/" * 5_000, "/" + "d/" * 3_000, "..", "../../../..", "/", ".", "~", "~nobody-there/x",
    "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/nowhere/at/all", "nowhere.tar", "*.tar", "**", "**x/*",
    "[", "💥",
    "{0..3}.tar", "{0..999999999999}.tar", "{{0..9999}{0..9999}}", "{", "}{", "{a,{b}", "{" * 2_000, "{a,b}" * 60,
    "file:///nowhere/0.tar", "file://", "memory://nothing", "://", "x://y", "nonsense://x/{0..3}.tar", "::", "a::b",
    "http://127.0.0.1:9/0.tar", "pipe:true", "${HOME}", "$HOME", "%s%n", "local-dir:", "local-dir:/", "local-dir:~x/y",
    "hf-hub:", "embedded", "zscl", "zscl*", "finetune", "we+wc", "icarl", "lwf-vr", "auto", "never", "always", "{c}",
    [], {}, [[]], [{}], [None], {"": None}, {"a": {"b": {"c": 1}}}, {1: 2}, [1, [2, [3, [4]]]], ["x"] * 300,
    {"path": 3}, {"path": "", "name": ""}, {"preset": "zscl"}, {"preset": ["zscl"]}, {"name": "ViT-B-32"},
    list(range(300)),
]  # fmt: skip
FIELDS = [
    "seed", "model", "tasks", "method", "name", "path", "preset", "steps", "classes", "reference", "images", "texts",
    "optimisation", "compute", "tracking", "uri", "variants", "base", "class_incremental", "order", "sed", "__class__",
    "model_config", "__proto__", "0", "", "a.b", "\x00", 0, None, True, 1.5,
]  # fmt: skip
SET = ["seed", "tasks.0", "tasks.9", "tasks.0.path", "method.distill.x", "model.name", "", ".", "a..b", "9" * 5_000]
SNIPPETS = [
    b"\xff\xfe", b"\x80", b"\xc3\x28", b"\x00", b"\x07", b"\t", b"\r", b"\xef\xbb\xbf", b"\xe2\x80\xa8",
    b"\xed\xa0\x80",
    b":", b": ", b"- ", b"? ", b"#", b"&a ", b"*a ", b"*b", b"<<: *a\n", b"<<: 1\n", b"!!", b"! ", b"!x ", b"%",
    b"%YAML 9.9\n",
    b"|", b">-", b"'", b'"', b'"\\ud800"', b'"\\0"', b'"\\x', b"[", b"]", b"{", b"}", b",", b"@", b"`", b"~", b"---\n",
    b"...\n", b"\n", b"\n\n  ", b"seed: 1\n", b"seed: 1\nseed: 2\n", b"a: &a [*a]\n", b"!!python/name:os.system",
    b"[" * 60, b"[" * 3_000,
    b"!!python/object/apply:os.system ['exit 1']\n", b"!!binary x", b"!!timestamp x", b"!!int x", b"!!set {a, b}",
    b"!!omap [a]", b"!!float x", b"2020-13-45", b"2020-02-30 10:00:00", b"0x", b"0o9", b"1_000", b"9" * 5_000,
    b".nan", b"-.inf",
    b"a: " * 400, b"- " * 3_000, b"\n? a\n? b\n", b"x" * 20_000,
]  # fmt: skip


def yaml_of(tree: Any) -> bytes:
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, stream)
    return stream.getvalue().encode("utf-8", errors="surrogatepass")


def places_in(tree: Any) -> list[tuple[Any, Any]]:
    """Yield every pair of container and key in a tree."""
    found: list[tuple[Any, Any]] = []
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        found.append((tree, key))
        found += places_in(tree[key])
    return found


def bent(tree: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    """Return a recipe with one to four values changed, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = places_in(tree)
        if not places:
            break
        container, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(NASTY))
            case 2:
                other, place = rng.choice(places)
                container[key] = (
                    copy.deepcopy(other[place]) if place in (other if isinstance(other, dict) else ()) else []
                )
            case 3:
                for _ in range(rng.choice([1, 3, 40, 100])):
                    container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}
            case 4:
                container[key] = str(container[key])
            case 5 if isinstance(container, list):
                container += copy.deepcopy(container)
            case _:
                container[key] = copy.deepcopy(rng.choice(NASTY))
    return tree


def torn(text: bytes, rng: random.Random) -> bytes:
    """Return the text of a recipe with changes at one to four positions."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        start = rng.randrange(len(text) + 1)
        stop = min(len(text), start + rng.choice([0, 1, 1, 2, 8, 40]))
        lines = text.split(b"\n")
        match rng.randrange(7):
            case 0:
                text = text[:start] + text[stop:]
            case 1:
                text = text[:start] + rng.randbytes(rng.choice([1, 1, 4, 30])) + text[stop:]
            case 2:
                line = rng.randrange(len(lines))
                text = b"\n".join([*lines[:line], lines[line], *lines[line:]])
            case 3:
                rng.shuffle(lines)
                text = b"\n".join(lines)
            case 4:
                text = text[:start]
            case _:
                text = text[:start] + rng.choice(SNIPPETS) + text[rng.choice([start, stop]) :]
    return text


@pytest.fixture
def good(recipe: Callable[..., dict[str, Any]], tasks: list[str], tmp_path: Path) -> list[dict[str, Any]]:
    """Return valid recipes that together contain every section."""
    plain = recipe()
    spelt_out = tmp_path / "good.yaml"
    spelt_out.write_bytes(yaml_of(plain))
    scenario = recipe(class_incremental={"path": tasks[0], "first": 2, "increment": 1, "order": 0})
    del scenario["tasks"]
    shards = [f"file://{tasks[0]}/train/{{0..2}}.tar", f"{tasks[1]}/train/*.tar"]
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    return [
        plain,
        recipes.to_recipe(recipes.load_experiment(spelt_out)),
        scenario,
        recipe(reference={"images": shards, "texts": "captions.txt"}, method="zscl"),
        recipe(method={"preset": "icarl", "memory": {"budget": 8}}, tasks=[{"path": task} for task in tasks[:2]]),
        recipe(method="lwf-vr", model={"name": "ViT-B-32-quickgelu", "pretrained": "openai"}),
        {"base": "good.yaml", "variants": {"a": {"seed": 1, "method.average": None}, "b": {"tasks.0.steps": 3}}},
    ]


@pytest.mark.fault("Malformed recipes, 2 000 and more", "Each is read, or refused in a sentence")
@pytest.mark.parametrize("numbers", parts("recipes", RECIPES))
def test_a_malformed_recipe_is_read_or_refused(
    numbers: range, good: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "fuzzed.yaml"

    def case(number: int) -> str | None:
        rng = random.Random(f"recipe {number}")
        tree = good[number % len(good)]
        file.write_bytes(torn(yaml_of(tree), rng) if number % 2 else yaml_of(bent(tree, rng)))
        overrides = []
        if rng.random() < 0.3:
            value = rng.choice([rng.choice(SNIPPETS), yaml_of(rng.choice(NASTY)).strip()]).decode(errors="replace")
            overrides = [f"{rng.choice(SET)}={value}" if rng.random() < 0.9 else value]
        try:
            experiments = load_variants(file, overrides, "all" if "variants" in tree else None)
        except InputError as error:
            return sentence_of(error, str(file), str(tmp_path / "good.yaml"), "--set", "--variant")
        for experiment in experiments.values():
            try:
                opened = resolve(experiment)
            except InputError as error:
                return sentence_of(error, "expected")
            assert len(opened.fingerprint) == 16
        return None

    judge(numbers, case)


# ----------------------------------------------------------------------------------------------------- shards

Member = tuple[tarfile.TarInfo, bytes]
LABELS = [
    b"", b"x", b"-1", b"1.5", b"4", b"9" * 30, b"9" * 5_000, b"\xff", b"\xd9\xa3", b"1\n2", b" 1 ", b"0x1", b"\0",
]  # fmt: skip
NAMES = [
    "/abs/0.png", "../up/0.png", "a/b/c/0.png", "a.b/c.d/0.png", ".0.png", "0", "0.", ".", "a\nb.png", "x\x1b[1m.png",
    "é/ü.png", "d" * 300 + ".png", "a/" * 120 + "0.png", "a.\nb/0.png", "0.png/", "__meta__.png", "0.PNG", "0.v2.png",
    "\udcff.png", "a//0.png",
]  # fmt: skip
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
PAX_HEADERS = [
    {"size": "-5"}, {"size": "99999999999"}, {"size": "x"}, {"path": "a\0b.png"}, {"mtime": "nan"},
    {"GNU.sparse.map": "0,1,2"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)},
]  # fmt: skip
SIZES = [  # values for the size in a header: enormous, negative, not a number
    b"77777777777\0", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, b"\xff" * 12, b"\xff" * 11 + b"\0", b"-0000000001\0",
    b"xxxxxxxxxxx\0", b"\0" * 12, b"00000001000\0",
]  # fmt: skip


def image_of(rng: random.Random, name: str = "PNG") -> bytes:
    pixels = np.frombuffer(rng.randbytes(16 * 16 * 3), dtype=np.uint8).reshape(16, 16, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, name)
    return stream.getvalue()


def png(width: int, height: int, pixels: bytes = b"", kind: int = 2, extra: bytes = b"") -> bytes:
    """Return a PNG file with arbitrary values in its header."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def bomb(rng: random.Random) -> bytes:
    """Return a small image file that decodes to a huge image."""
    match rng.randrange(5):
        case 0:
            return png(60_000, 60_000, b"\0" * 1_000)
        case 1:
            return png(30_000, 1, b"\0" * (3 * 30_000 + 1))  # a strip; resizing its shorter side enlarges it
        case 2:
            return png(2**31 - 1, 2**31 - 1)
        case 3:
            text = b"zTXt" + b"k\0\0" + zlib.compress(b"\0" * 70_000_000)
            chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
            return png(4, 4, b"\0" * 52, extra=chunk)
        case _:
            return png(0, 0)


class Evil:
    """An object whose unpickling has a visible side effect."""

    mark = ""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path(self.mark),)


def broken_image(rng: random.Random) -> bytes:
    image = image_of(rng, rng.choice(["PNG", "JPEG", "WEBP"]))
    match rng.randrange(7):
        case 0:
            return image[: rng.randrange(len(image))]
        case 1:
            place = rng.randrange(len(image))
            return image[:place] + rng.randbytes(rng.choice([1, 4, 40])) + image[place + 4 :]
        case 2:
            return bomb(rng)
        case 3:
            return pickle.dumps(Evil())
        case 4:
            return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n"
        case 5:
            return base64.b64encode(image)
        case _:
            return rng.randbytes(rng.choice([0, 1, 100]))


def member(name: str, content: bytes, **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def bent_samples(rng: random.Random) -> list[Member]:
    """Return samples of four classes, one of which is malformed."""
    found: list[Member] = []
    odd = rng.randrange(4)
    for number in range(4):
        key, image, label = f"{number:03}", image_of(rng), str(number).encode()
        if number != odd:
            found += [member(f"{key}.png", image), member(f"{key}.cls", label), member(f"{key}.txt", b"a thing")]
            continue
        match rng.randrange(14):
            case 0:
                found += [member(f"{key}.png", broken_image(rng)), member(f"{key}.cls", label)]
            case 1:
                found += [member(f"{key}.png", image)]
            case 2:
                found += [member(f"{key}.png", image), member(f"{key}.cls", rng.choice(LABELS))]
            case 3:
                found += [member(f"{key}.cls", label), member(f"{key}.txt", b"no image")]
            case 4:
                found += [member(f"{key}.png", b""), member(f"{key}.cls", label)]
            case 5:
                kind = rng.choice(KINDS)
                target = rng.choice(["/etc/passwd", "../../../etc/passwd", "000.png", f"{key}.png"])
                found += [member(f"{key}.png", b"", type=kind, linkname=target), member(f"{key}.cls", label)]
            case 6:
                evil = pickle.dumps(Evil())
                found += [
                    member(f"{key}.{rng.choice(['pkl', 'pyd', 'pth', 'npy', 'pt'])}", evil),
                    member(f"{key}.png", image),
                    member(f"{key}.cls", label),
                ]
            case 7:
                found += [member(f"{key}.png", image), member(f"{key}.cls", label)] * 2
            case 8:
                name = rng.choice(NAMES)
                found += [member(name, image), member(name.rpartition(".")[0] + ".cls", label)]
            case 9:
                found += [
                    member(f"{key}.png", image),
                    member(f"{key}.jpg", image_of(rng, "JPEG")),
                    member(f"{key}.cls", label),
                ]
            case 10:
                headers = rng.choice(PAX_HEADERS)
                found += [member(f"{key}.png", image, pax_headers=headers), member(f"{key}.cls", label)]
            case 11:
                found += [member(f"{key}.png", image), member(f"{key}.cls", b"0" * rng.choice([1, 20, 100_000]))]
            case 12:
                found += [
                    member("sub/", b"", type=tarfile.DIRTYPE),
                    member(f"sub/{key}.png", image),
                    member(f"sub/{key}.cls", label),
                ]
            case _:
                found += [
                    member(f"{key}.png", image_of(rng, rng.choice(["GIF", "BMP", "TIFF", "PPM"]))),
                    member(f"{key}.cls", label),
                ]
    return found


def tar_of(members: list[Member], rng: random.Random) -> bytes:
    stream = io.BytesIO()
    kind = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    with tarfile.open(fileobj=stream, mode="w", format=kind, errors="surrogateescape") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + f"{sum(blank):06o}\0 ".encode() + blank[156:]


def bent_shard(rng: random.Random) -> bytes:
    """Return a shard with a malformed sample or a malformed file structure."""
    shard = tar_of(bent_samples(rng), rng)
    headers = [place for place in range(0, len(shard) - 512, 512) if shard[place + 257 : place + 262] == b"ustar"]
    place = rng.choice(headers)
    match rng.randrange(16):
        case 0:
            return shard[: rng.randrange(len(shard))]
        case 1:
            return shard[:place]
        case 2:  # flipped bits of a header, which its checksum detects
            where = place + rng.randrange(512)
            return shard[:where] + bytes([shard[where] ^ (1 << rng.randrange(8))]) + shard[where + 1 :]
        case 3:  # flipped bits of a header with a recomputed checksum
            header = bytearray(shard[place : place + 512])
            for _ in range(rng.choice([1, 4])):
                header[rng.randrange(512)] = rng.randrange(256)
            return shard[:place] + with_checksum(bytes(header)) + shard[place + 512 :]
        case 4:  # sizes: enormous, negative, not a number
            header = shard[place : place + 124] + rng.choice(SIZES) + shard[place + 136 : place + 512]
            return shard[:place] + with_checksum(header) + shard[place + 512 :]
        case 5:  # types: sparse, pax, long names, unknown
            kind = bytes([rng.choice(b"SxgLKVMD7Z\x001235")])
            header = shard[place : place + 156] + kind + shard[place + 157 : place + 512]
            return shard[:place] + with_checksum(header) + shard[place + 512 :]
        case 6:
            return gzip.compress(shard) if rng.random() < 0.7 else gzip.compress(b"\0" * 50_000_000)
        case 7:
            return rng.choice(
                [b"", b"\0" * 512, b"\0" * 10_240, b"PK\x03\x04" + shard, pickle.dumps(Evil()), rng.randbytes(3_000)]
            )
        case 8:
            return shard[:place] + b"\0" * 512 + shard[place + 512 :]
        case 9:
            return shard + rng.choice([b"x", shard, b"\0" * 5_000])
        case _:
            return shard


def decoded(image: Image.Image) -> torch.Tensor:
    """Resize the shorter side and crop the centre, like open_clip's transform."""
    scale = 16 / min(image.size)
    resized = image.resize((max(16, round(image.width * scale)), max(16, round(image.height * scale))))
    return torch.tensor(np.asarray(resized)[:16, :16].transpose(2, 0, 1).copy())


def read_all(samples: Samples, task: TaskFolder) -> None:
    decode = Decoder(decoded, task.get_label)
    for item in EvaluationImages(samples, decode, 0, 1)():
        assert isinstance(item, str) or item[0].shape == (3, 16, 16)
    for _ in islice(TrainingImages(samples, decode, seed=0, batch_size=4, rank_indices=range(4))(), 10):
        pass
    assert isinstance(samples, IndexedSamples | StreamedSamples)
    assert all(isinstance(text, str) for text in samples.iter_texts())
    assert samples.digest


@pytest.mark.fault("Malformed shards, 200 and more", "Each is read, or refused in a sentence")
@pytest.mark.parametrize("numbers", parts("shards", SHARDS))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_malformed_shard_is_read_or_refused(numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evil, "mark", str(tmp_path / "unpickled"))

    def case(number: int) -> str | None:
        folder = tmp_path / str(number)
        shard = bent_shard(random.Random(f"shard {number}"))
        for split in ("train", "test"):
            (folder / split).mkdir(parents=True)
            (folder / split / "0.tar").write_bytes(shard)
            (folder / split / "nshards.txt").write_text("1\n")
        (folder / "classnames.txt").write_text("a\nb\nc\nd\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n")
        task = TaskFolder.open(Task.model_validate(str(folder)))
        url = f"file://{folder}/train/0.tar"
        for read in (
            lambda: task.check(max_broken_share=0.0),
            lambda: read_all(task.train, task),
            lambda: read_all(StreamedSamples([url]), task),
        ):
            try:
                read()
            except InputError as error:
                if problem := sentence_of(error, "train/0.tar"):
                    return problem
        return "was unpickled" if (tmp_path / "unpickled").exists() else None

    judge(numbers, case)
