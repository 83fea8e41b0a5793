"""Tiny datasets on disk in the original formats that torchvision's classes read without a download.

Every function writes a dataset below a root folder, and returns the expected result of its conversion: for each split,
the samples in torchvision's order, as pairs of the readable class name and the bytes of the image, if the source has
image files. The split of a dataset without official splits is `all`.
"""

import io
import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

Expected = dict[str, list[tuple[str, bytes | None]]]

_shades = itertools.count()

CALTECH = (  # noqa: SIM905
    "Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai brain "
    "brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body "
    "cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar "
    "elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill "
    "headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus "
    "mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid "
    "revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish "
    "stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat "
    "windsor_chair wrench yin_yang"
).split()
CALTECH_SPELT_OTHERWISE = {
    "Faces": "off-center face", "Faces_easy": "centered face", "Leopards": "leopard", "Motorbikes": "motorbike",
    "airplanes": "airplane", "car_side": "side of a car", "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat", "crocodile_head": "head of a  crocodile",
    "flamingo_head": "head of a flamingo", "snoopy": "snoopy (cartoon beagle)", "yin_yang": "yin and yang symbol",
}  # fmt: skip
EUROSAT = {
    "AnnualCrop": "annual crop land", "Forest": "forest", "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road", "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land", "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments", "River": "river", "SeaLake": "lake or sea",
}  # fmt: skip
PETS = (  # noqa: SIM905
    "Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay boxer "
    "British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees "
    "havanese japanese_chin keeshond leonberger Maine_Coon miniature_pinscher newfoundland Persian pomeranian pug "
    "Ragdoll Russian_Blue saint_bernard samoyed scottish_terrier shiba_inu Siamese Sphynx staffordshire_bull_terrier "
    "wheaten_terrier yorkshire_terrier"
).split()


def jpeg(file: Path) -> bytes:
    """Write a JPEG with unique content."""
    stream, shade = io.BytesIO(), next(_shades)
    Image.new("RGB", (8, 8), (shade % 256, shade // 256 % 256, 90)).save(stream, "JPEG")
    content = stream.getvalue() + shade.to_bytes(4)  # decoders ignore bytes after the end of the image
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return content


def lines(file: Path, content: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in content))


def aircraft(root: Path) -> Expected:
    data = root / "fgvc-aircraft-2013b/data"
    classes = ["707-320", "Cessna 172", "F-16A/B", "F/A-18"]
    lines(data / "variants.txt", classes)
    numbers, expected = itertools.count(34_309), {}
    for split, order in {"train": classes[::-1], "val": classes, "trainval": classes, "test": classes * 2}.items():
        named = [(f"{next(numbers):07d}", name) for name in order]
        lines(data / f"images_variant_{split}.txt", (f"{number} {name}" for number, name in named))
        expected[split] = [(name, jpeg(data / f"images/{number}.jpg")) for number, name in named]
    return {split: expected[split] for split in ("train", "test")}


def caltech101(root: Path) -> Expected:
    folder = root / "caltech101/101_ObjectCategories"
    jpeg(folder / "BACKGROUND_Google/image_0001.jpg")
    names = {name: CALTECH_SPELT_OTHERWISE.get(name, name.replace("_", " ")) for name in CALTECH}
    return {
        "all": [
            (spelt, jpeg(folder / name / f"image_{number:04d}.jpg"))
            for name, spelt in names.items()
            for number in ((1, 2) if name == "Faces" else (1,))
        ]
    }


def cifar100(root: Path) -> Expected:
    folder = root / "cifar-100-python"
    classes = ["apple", "aquarium_fish", "baby", "willow_tree"]
    folder.mkdir(parents=True)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": classes}))
    expected = {}
    for split, labels in {"train": [3, 1, 0, 2, 1], "test": [1, 3]}.items():
        pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 3_072), dtype=np.uint8)
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
        expected[split] = [(classes[label].replace("_", " "), None) for label in labels]
    return expected


def dtd(root: Path) -> Expected:
    folder, expected = root / "dtd/dtd", {}
    for split, number in {"train": 38, "val": 40, "test": 42}.items():
        files = [f"{name}/{name}_{number:04d}.jpg" for name in ("zigzagged", "banded", "polka-dotted")]
        lines(folder / f"labels/{split}1.txt", files)
        expected[split] = [(file.partition("/")[0], jpeg(folder / "images" / file)) for file in files]
    return {split: expected[split] for split in ("train", "test")}


def eurosat(root: Path) -> Expected:
    folder = root / "eurosat/2750"
    return {
        "all": [
            (spelt, jpeg(folder / name / f"{name}_{number}.jpg"))
            for name, spelt in EUROSAT.items()
            for number in (1, 2)
        ]
    }


def flowers(root: Path) -> Expected:
    from torchvision.datasets import Flowers102

    spelt = {"globe-flower": "globe flower", "pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant"}
    names = [spelt.get(name, name) for name in Flowers102.classes]
    folder = root / "flowers-102"
    labels = np.array([1 + number % 102 for number in range(210)], dtype=np.uint8)
    ids = {"trnid": np.arange(104, 0, -1), "valid": np.arange(105, 107), "tstid": np.arange(107, 211)}
    folder.mkdir(parents=True)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels})
    scipy.io.savemat(folder / "setid.mat", ids)
    images = {number: jpeg(folder / f"jpg/image_{number:05d}.jpg") for number in range(1, 211)}
    return {
        split: [(names[labels[number - 1] - 1], images[number]) for number in ids[key]]
        for split, key in {"train": "trnid", "test": "tstid"}.items()
    }


def food(root: Path) -> Expected:
    folder, numbers, expected = root / "food-101", itertools.count(1_000), {}
    for split in ("train", "test"):
        files = {name: [f"{name}/{next(numbers)}" for _ in range(2)] for name in ("waffles", "apple_pie", "pad_thai")}
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        (folder / f"meta/{split}.json").write_text(json.dumps(files))
        expected[split] = [
            (name.replace("_", " "), jpeg(folder / f"images/{file}.jpg")) for name, of in files.items() for file in of
        ]
    return expected


def mnist(root: Path) -> Expected:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    expected = {}
    for split, prefix, count in (("train", "train", 12), ("test", "t10k", 10)):
        labels = (np.arange(count)[::-1] % 10).astype(np.uint8)
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, content in (("images", pixels), ("labels", labels)):
            header = bytes([0, 0, 8, content.ndim]) + b"".join(size.to_bytes(4) for size in content.shape)
            (folder / f"{prefix}-{kind}-idx{content.ndim}-ubyte").write_bytes(header + content.tobytes())
        expected[split] = [(str(label), None) for label in labels]
    return expected


def oxford_pet(root: Path) -> Expected:
    folder, expected = root / "oxford-iiit-pet", {}
    for split, number in {"trainval": 1, "test": 2}.items():
        order = list(enumerate(PETS, start=1))[::-1]
        lines(folder / f"annotations/{split}.txt", (f"{name}_{number} {label} 1 1" for label, name in order))
        expected[split] = [
            (" ".join(word.title() for word in name.split("_")), jpeg(folder / f"images/{name}_{number}.jpg"))
            for _, name in order
        ]
    return {"train": expected["trainval"], "test": expected["test"]}


def stanford_cars(root: Path) -> Expected:
    folder = root / "stanford_cars"
    classes = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "smart fortwo Convertible 2012"]
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(classes, dtype=object)})
    expected = {}
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(f"{number:05d}.jpg", label) for number, label in enumerate([3, 1, 2, 1], start=1)]
        table = np.array(rows, dtype=[("fname", object), ("class", object)])
        scipy.io.savemat(folder / file, {"annotations": table})
        expected[split] = [(classes[label - 1], jpeg(folder / f"cars_{split}" / name)) for name, label in rows]
    return expected


def sun397(root: Path) -> Expected:
    folder = root / "SUN397"
    classes = ["abbey", "apartment_building/outdoor", "theater/indoor_procenium", "youth_hostel"]
    lines(folder / "ClassName.txt", (f"/{name[0]}/{name}" for name in classes))
    files = {
        f"{name[0]}/{name}/sun_{number}.jpg": name.replace("_", " ").replace("/", " ")
        for number in ("b", "a", "c")
        for name in reversed(classes)
    }
    images = {file: jpeg(folder / file) for file in files}
    return {"all": [(files[file], images[file]) for file in sorted(files)]}


TREES: Mapping[str, Callable[[Path], Expected]] = {
    "Aircraft": aircraft,
    "Caltech101": caltech101,
    "CIFAR100": cifar100,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "Flowers": flowers,
    "Food": food,
    "MNIST": mnist,
    "OxfordPet": oxford_pet,
    "StanfordCars": stanford_cars,
    "SUN397": sun397,
}
