"""Folders of images: every layout, crops against other libraries, and files that ask for too much memory."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import WNIDS, jpeg_arrays, photograph, png_header, write_imagenet, write_packed, write_tiny_imagenet
from PIL import Image
from scipy import stats

from nmflow.train.config_sections import DataConfig
from nmflow.train.data import Data, load_data, step_generator
from nmflow.train.data import images as images_module
from nmflow.train.data.boxes import Box, RandomBox
from nmflow.train.data.image_files import MAX_PIXELS, RESIZED_CROP, read_image, size_of
from nmflow.train.data.splits import held_out

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def load(root: Path, **settings: object) -> Data:
    return load_data(DataConfig(name="images", path=str(root), **settings))


def bytes_of(inputs: torch.Tensor) -> np.ndarray:
    """[B, H, W, 3] before the scale was taken away."""
    return ((inputs.movedim(1, -1).numpy() * STD + MEAN) * 255).round().astype(np.int64)


# ------------------------------------------------------------------------------------------------ ImageNet
def test_imagenet_as_it_is_sorted(tmp_path: Path) -> None:
    data = load(write_imagenet(tmp_path, classes=3, train=10, val=4), image_size=32)
    assert (data.num_classes, data.sample_shape) == (3, (3, 32, 32))
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 12)
    assert data.notes == (
        "val/ is the test split", "val is every tenth training image of a class",
        "evaluated on the middle 87.5% of the shorter side",
    )  # fmt: skip
    wnids = sorted(WNIDS[:3])
    for split in (data.train, data.val, data.test):
        _, labels = split.batch(torch.arange(len(split)))
        assert [name.partition("/")[0] for name in split.files.names] == [wnids[label] for label in labels]
    assert [name.partition("_")[2] for name in data.val.files.names] == ["9.JPEG"] * 3


def test_a_flat_val_is_told_how_to_sort_it(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    for path in list((tmp_path / "val").rglob("*.JPEG")):
        path.rename(tmp_path / "val" / path.name)
    for wnid in WNIDS[:3]:
        (tmp_path / "val" / wnid).rmdir()
    with pytest.raises(ValueError, match=r"val: its images lie in no folders of classes; sort them.*valprep\.sh"):
        load(tmp_path, image_size=32)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    write_imagenet(tmp_path, classes=1)
    with pytest.raises(ValueError, match=r"train: a single class, n02124075; .* two or more"):
        load_data(DataConfig(name="images", path=str(tmp_path), image_size=32))


def test_flat_test_images_have_no_labels(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "test").mkdir()
    photograph(np.random.default_rng(0), 50, 50).save(tmp_path / "test" / "ILSVRC2012_test_00000001.JPEG")
    assert "test/ has no labels and is not used; val/ is the test split" in load(tmp_path, image_size=32).describe()


def test_of_many_images_a_hundredth_is_set_aside() -> None:
    labels = torch.tensor([0, 1]).repeat(100_001)
    is_val, note = held_out(labels[:200_000])
    assert int(is_val.sum()) == 20_000
    assert "tenth" in note
    is_val, note = held_out(labels)
    assert "hundredth" in note
    assert is_val.nonzero().flatten().tolist()[:4] == [198, 199, 398, 399]
    assert int(is_val.sum()) == 2000


# -------------------------------------------------------------------------------------------- Tiny ImageNet
def test_tiny_imagenet_as_it_is_downloaded(tmp_path: Path) -> None:
    data = load(write_tiny_imagenet(tmp_path, classes=7, train=10, val=3))
    assert (data.num_classes, data.sample_shape) == (7, (3, 64, 64))
    assert (len(data.train), len(data.val), len(data.test)) == (63, 7, 21)
    assert "test/ has no labels" in data.describe()
    wnids = sorted(WNIDS)
    inputs, labels = data.test.batch(torch.arange(21))
    for name, image, label in zip(data.test.files.names, bytes_of(inputs), labels.tolist(), strict=True):
        number = int(re.fullmatch(r"val_(\d+)\.JPEG", name)[1])
        assert wnids[label] == WNIDS[number % 7]
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / "val" / "images" / name)))
    _, labels = data.train.batch(torch.arange(63))
    assert [name.partition("/")[0] for name in data.train.files.names] == [wnids[label] for label in labels]


def test_tiny_imagenet_with_its_val_sorted(tmp_path: Path) -> None:
    root = write_tiny_imagenet(tmp_path)
    official = load(root)
    by_name = dict(zip(official.test.files.names, official.test.files.labels.tolist(), strict=True))
    for name, label in by_name.items():
        folder = root / "val" / sorted(WNIDS)[label] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (root / "val" / "images" / name).rename(folder / name)
    (root / "val" / "images").rmdir()
    (root / "val" / "val_annotations.txt").unlink()
    again = load(root).test.files
    assert {Path(name).name: label for name, label in zip(again.names, again.labels.tolist(), strict=True)} == by_name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("val_4.JPEG", "val_3.JPEG"), "line 5 does not name an image, once, and a class"),
        (lambda text: text.replace("val_4.JPEG", "../val_4.JPEG"), "line 5 does not name an image"),
        (lambda text: text.replace(WNIDS[4], "n00000000"), "line 5 does not name an image"),
        (lambda text: text.partition("\n")[2], "1 images without a line, such as val_0.JPEG"),
        (lambda text: text + "nonsense\n", "line 22 does not name"),
    ],
    ids=["twice", "elsewhere", "no-class", "lacking", "nonsense"],
)
def test_annotations_with_a_fault_are_refused(tmp_path: Path, change: Any, told: str) -> None:
    file = write_tiny_imagenet(tmp_path) / "val" / "val_annotations.txt"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=rf"val_annotations\.txt: {told}"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------- packed
def test_packed_images_have_the_size_that_they_have(tmp_path: Path) -> None:
    data = load(write_packed(tmp_path, "some", {"train": 60, "val": 12}, size=16, classes=6))
    assert (data.num_classes, data.sample_shape) == (6, (3, 16, 16))
    assert (len(data.train), len(data.val), len(data.test)) == (54, 6, 12)
    assert "read from some_train_jpeg.npz, some_val_jpeg.npz; val/ is the test split" in data.describe()
    _, files = jpeg_arrays(12, seed=1, size=16, classes=6)
    inputs, labels = data.test.batch(torch.arange(12))
    assert labels.tolist() == [number % 6 for number in range(12)]
    for image, file in zip(bytes_of(inputs), files, strict=True):
        (tmp_path / "one.jpg").write_bytes(file)
        assert np.array_equal(image, np.asarray(Image.open(tmp_path / "one.jpg")))


def test_packed_images_with_a_test_of_their_own(tmp_path: Path) -> None:
    data = load(write_packed(tmp_path, "some", {"train": 4, "val": 6, "test": 2}))
    assert (len(data.train), len(data.val), len(data.test)) == (4, 6, 2)


def test_packed_images_with_a_fault_are_refused(tmp_path: Path) -> None:
    write_packed(tmp_path, "some", {"train": 20})
    with pytest.raises(FileNotFoundError, match=r"some_val_jpeg\.npz: not found; expected it or some_test_jpeg\.npz"):
        load(tmp_path)
    write_packed(tmp_path, "some", {"train": 20, "val": 4})
    with pytest.raises(ValueError, match=r"leave data\.image_size out"):
        load(tmp_path, image_size=16)
    arrays = jpeg_arrays(4)[0]
    for key, value, told in (
        ("labels", np.array([0, 1, 2, 0], np.uint8), "labels run from 0 to 2; 2 class names"),
        ("labels", np.array([0, 1, -1, 0], np.int8), "labels run from -1 to 1"),
        ("class_names", np.array(["class 0", "other"]), "its class names are not those of some_train"),
        ("class_names", np.array(["class 0", None]), "expected a vector of str_"),
        ("class_names", np.array([0, 1]), "expected a vector of str_"),
    ):
        np.savez(tmp_path / "some_val_jpeg.npz", **{**arrays, key: value})
        with pytest.raises(ValueError, match=rf"some_val_jpeg\.npz: .*{told}"):
            load(tmp_path)
    np.savez(tmp_path / "some_val_jpeg.npz", **jpeg_arrays(4, size=16)[0])
    with pytest.raises(ValueError, match="image 0: RGB 16x16, expected RGB 32x32"):
        load(tmp_path)
    write_packed(tmp_path, "other", {"train": 20, "val": 4})
    with pytest.raises(ValueError, match=r"which of other_train_jpeg\.npz, some_train_jpeg\.npz"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ measures
@pytest.mark.parametrize(("classes", "measures"), [(5, ("accuracy",)), (6, ("accuracy", "top5"))])
def test_top_5_where_it_says_something(tmp_path: Path, classes: int, measures: tuple[str, ...]) -> None:
    root = write_packed(tmp_path, "some", {"train": 10 * classes, "val": 6}, classes=classes)
    assert load(root).objective.measures == measures


# --------------------------------------------------------------------------------------------------- crops
def write_one(root: Path, image: Image.Image) -> Path:
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            image.save(root / split / name / "one.png")
    return root


def test_evaluation_looks_at_the_middle(tmp_path: Path) -> None:
    """At 7/8 of the shorter side no pixel has to be made up: it is the middle of the file, bit for bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    data = load(write_one(tmp_path, Image.fromarray(pixels)), image_size=56)
    for split in (data.val, data.test, data.train):
        inputs, _ = split.batch(torch.tensor([0]))
        assert np.array_equal(bytes_of(inputs)[0], pixels[4:60, 12:68])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (90, 300), (40, 41)])
def test_evaluation_is_torchvisions_resize_and_crop(tmp_path: Path, height: int, width: int) -> None:
    """Up to the rounding of the size in between, which torchvision makes and we do not."""
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision comes with timm, an extra")
    image = photograph(np.random.default_rng(height), height, width)
    inputs, _ = load(write_one(tmp_path, image), image_size=112).test.batch(torch.tensor([0]))
    theirs = transforms.Compose(
        [transforms.Resize(128, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(112)]
    )(image)
    assert np.abs(bytes_of(inputs)[0] - np.asarray(theirs, np.int64)).mean() < 1.0


def test_a_random_crop_is_torchvisions_crop_and_resize(tmp_path: Path) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional", reason="torchvision comes with timm")
    image = photograph(np.random.default_rng(1), 70, 90)
    image.save(tmp_path / "one.png")
    numbers = RESIZED_CROP.draw(20, torch.Generator().manual_seed(0))
    boxes = [RESIZED_CROP.inside(70, 90, each) for each in numbers]
    assert len(set(boxes)) == 20
    for box, each in zip(boxes, numbers, strict=True):
        theirs = functional.resized_crop(image, *box, [24, 24], functional.InterpolationMode.BICUBIC)
        ours = read_image(tmp_path / "one.png", 24, crop=each)
        assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(theirs))


def test_random_boxes_are_spread_like_torchvisions() -> None:
    """By Kolmogorov's and Smirnov's test of areas, shapes and places, on an image where most tries fit."""
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision comes with timm, an extra")
    torch.manual_seed(0)
    image = torch.empty(3, 400, 500)
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(4000)])
    numbers = RESIZED_CROP.draw(4000, torch.Generator().manual_seed(1))
    ours = np.array([RESIZED_CROP.inside(400, 500, each) or RESIZED_CROP.central(400, 500) for each in numbers])
    assert ((ours[:, 0] >= 0) & (ours[:, 0] + ours[:, 2] <= 400)).all()
    assert ((ours[:, 1] >= 0) & (ours[:, 1] + ours[:, 3] <= 500)).all()
    for name, figure in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "shape": lambda box: np.log(box[:, 3] / box[:, 2]),
        "top": lambda box: box[:, 0] / (401 - box[:, 2]),
        "left": lambda box: box[:, 1] / (501 - box[:, 3]),
    }.items():
        assert stats.ks_2samp(figure(ours), figure(theirs)).pvalue > 0.01, name


@pytest.mark.parametrize(
    ("size", "box"),
    [((10, 100), Box(0, 43, 10, 13)), ((100, 10), Box(43, 0, 13, 10)), ((30, 30), Box(0, 0, 30, 30)),
     ((1, 1000), Box(0, 499, 1, 1))],
)  # fmt: skip
def test_where_no_box_fits_the_middle_is_taken(size: tuple[int, int], box: Box) -> None:
    whole = RandomBox(area=(1.0, 1.0), ratio=(3 / 4, 4 / 3))
    assert whole.central(*size) == box
    numbers = whole.draw(1, torch.Generator().manual_seed(0))[0]
    assert whole.inside(*size, numbers) is None


def test_crops_are_random_in_training_alone_and_a_function_of_the_generator(tmp_path: Path, monkeypatch: Any) -> None:
    root = write_imagenet(tmp_path)
    data, plain = load(root, image_size=32), load(root, image_size=32, augment=False)
    items = torch.arange(6)
    first, again, other = (data.train.batch(items, step_generator(0, step))[0] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    monkeypatch.setattr(images_module, "MAX_THREADS", 1)
    assert torch.equal(data.train.batch(items, step_generator(0, 0))[0], first)
    assert torch.equal(plain.train.batch(items, step_generator(0, 0))[0], data.train.batch(items)[0])
    for split in (data.val, data.test):
        all_items = torch.arange(len(split))
        assert torch.equal(split.batch(all_items, step_generator(0, 0))[0], split.batch(all_items)[0])


# ------------------------------------------------------------------------------------------ hostile files
def crop_of(path: Path) -> np.ndarray:
    return read_image(path, 32, crop=RESIZED_CROP.draw(1, torch.Generator().manual_seed(0))[0])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("read", [lambda path: read_image(path, 32), size_of, crop_of], ids=["fit", "size", "crop"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, read: Any) -> None:
    """The file has no pixels: whoever decoded it would find it cut short."""
    edge = math.isqrt(MAX_PIXELS) + 1
    (bomb := tmp_path / "bomb.png").write_bytes(png_header(edge, edge))
    with pytest.raises(ValueError, match=rf"bomb\.png: no readable image: {edge}x{edge} is more than 89,478,485"):
        read(bomb)
    bomb.write_bytes(png_header(9 * edge, 9 * edge))  # Pillow's own limit
    with pytest.raises(ValueError, match=r"bomb\.png: no readable image: .*decompression bomb"):
        read(bomb)


def test_a_long_thin_image_does_not_grow(tmp_path: Path) -> None:
    """Brought to 37 pixels of its shorter side first, this one would have 20 million pixels a row."""
    Image.new("RGB", (600_000, 1), (10, 20, 30)).save(tmp_path / "thin.png")
    thin = tmp_path / "thin.png"
    for pixels in (read_image(thin, 32), read_image(thin, 32, middle=0.875), crop_of(thin)):
        assert (pixels == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def test_only_formats_of_images_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert Image.open(path).format == "EPS"  # so Pillow would start an interpreter for it
    with pytest.raises(ValueError, match=r"page\.jpg: no readable image: cannot identify"):
        read_image(path, 8)


def test_colours_of_every_kind_become_three(tmp_path: Path) -> None:
    red = Image.new("RGB", (9, 9), (250, 10, 10))
    kinds = {"cmyk.jpg": red.convert("CMYK"), "grey.png": red.convert("L"), "palette.gif": red.quantize(4)}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        assert read_image(tmp_path / name, 8).shape == (3, 8, 8)
    red.save(tmp_path / "png.JPEG", "PNG")  # one file of ImageNet is such a one
    assert read_image(tmp_path / "png.JPEG", 8)[:, 0, 0].tolist() == [250, 10, 10]
