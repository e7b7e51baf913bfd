"""Data: order, augmentation, splits, and readers that refuse what they should not trust."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import jpeg, jpeg_arrays
from PIL import Image

from nmflow.train.config_sections import DataConfig
from nmflow.train.data import batch_indices, load_data, share, step_generator
from nmflow.train.data.augment import flip, mix, shift
from nmflow.train.data.jpeg_npz import _size_of, read_jpeg_npz
from nmflow.train.data.order import _alike, _permutation
from nmflow.train.data.safe_pickle import read_array_pickle
from nmflow.train.data.splits import rank_in_class


def load(text: str, **settings: object):
    name, _, path = text.partition(":")
    return load_data(DataConfig(name=name, path=path or None, **settings))


def everything(split, generator=None):
    return split.batch(torch.arange(len(split)), generator)


# -------------------------------------------------------------------------------------------------- order
@settings(deadline=None)
@given(num_items=st.integers(1, 30), batch=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation_and_nothing_is_dropped(num_items, batch, seed):
    steps = -(-4 * num_items // batch)
    stream = torch.cat([batch_indices(num_items, batch, seed, step) for step in range(steps)]).tolist()
    assert len(stream) == steps * batch
    for epoch in range(4):
        assert sorted(stream[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


def test_the_order_depends_on_seed_and_epoch_alone():
    straight = [batch_indices(50, 8, 3, step) for step in range(20)]
    _permutation.cache_clear()
    for step in random.Random(0).sample(range(20), 20):
        again = batch_indices(50, 8, 3, step)
        assert torch.equal(again, straight[step])
        again.zero_()                                             # the caller's own copy
        assert torch.equal(batch_indices(50, 8, 3, step), straight[step])
    epochs = {tuple(batch_indices(50, 50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(epochs) == 9


@settings(deadline=None)
@given(num_items=st.integers(1, 30), batch=st.integers(1, 70), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_batches_of_like_lengths_drop_nothing_either(num_items, batch, seed, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=num_items, max_size=num_items)))
    steps = -(-4 * num_items // batch)
    stream = torch.cat([batch_indices(num_items, batch, seed, step, lengths) for step in range(steps)]).tolist()
    assert len(stream) == steps * batch
    for epoch in range(4):
        assert sorted(stream[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


def test_batches_of_like_lengths_pad_little_and_come_in_no_order():
    """Of 10,007 items, so that batches lie in two epochs; lengths as sentences have them, one in ten long."""
    generator = random.Random(0)
    lengths = torch.tensor([generator.choice([4, 7, 9, 9, 11, 12, 14, 17, 20, 48]) for _ in range(10_007)])

    def padded(step, like):
        return 32 * int(lengths[batch_indices(10_007, 32, 1, step, lengths if like else None)].max())

    tokens, steps = 32 * float(lengths.float().mean()), range(700)
    assert sum(padded(step, False) for step in steps) > 2.5 * tokens * len(steps)
    assert sum(padded(step, True) for step in steps) < 1.1 * tokens * len(steps)
    drawn = [[lengths[batch_indices(10_007, 32, seed, step, lengths)] for step in steps] for seed in (1, 2)]
    means = torch.tensor([[float(batch.float().mean()) for batch in batches] for batches in drawn])
    epoch = 10_007 // 32
    for one, other in [
        (means[0, :-1], means[0, 1:]),  # what follows is of any length, in another epoch and for another seed too
        (means[0, :epoch], means[0, epoch + 1 : 2 * epoch + 1]),
        (means[0], means[1]),
    ]:
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.15
    straight = [batch_indices(10_007, 32, 1, step, lengths) for step in range(300, 340)]
    _alike.cache_clear()
    for step in random.Random(0).sample(range(300, 340), 40):
        assert torch.equal(batch_indices(10_007, 32, 1, step, lengths.clone()), straight[step - 300])
    epochs = {tuple(batch_indices(10_007, 32, seed, step, lengths).tolist()) for seed in (1, 2) for step in (3, 330)}
    assert len(epochs) == 4


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, -1)])
def test_an_impossible_order_is_refused(arguments):
    with pytest.raises(ValueError, match="at least"):
        batch_indices(*arguments)


@given(processes=st.integers(1, 5), accumulate=st.integers(1, 5), size=st.integers(1, 5))
def test_shares_are_equal_and_cover_the_batch_once(processes, accumulate, size):
    batch = list(range(processes * accumulate * size))
    places = [(process, micro) for process in range(processes) for micro in range(accumulate)]
    parts = [batch[share(len(batch), process, processes, micro, accumulate)] for process, micro in places]
    assert {len(part) for part in parts} == {size}
    assert sorted(item for part in parts for item in part) == batch


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((10, 0, 2, 0, 2), "do not divide a batch of 10; the nearest batch above is 12"), ((2, 0, 4, 0, 1), "is 4"),
     ((4, 2, 2, 0, 1), "counted from 0"), ((4, 0, 1, -1, 1), "counted from 0")],
)
def test_an_impossible_share_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        share(*arguments)


def test_each_share_of_each_step_has_randomness_of_its_own():
    draws = {
        key: tuple(torch.rand(4, generator=step_generator(*key)).tolist())
        for key in [(0, 0), (0, 1), (1, 0), (0, 0, 8), (0, 8, 0), (8, 0, 0)]
    }
    assert len(set(draws.values())) == len(draws)
    for key, values in draws.items():
        assert tuple(torch.rand(4, generator=step_generator(*key)).tolist()) == values


def test_rank_in_class_counts_earlier_ones():
    labels = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    seen: Counter[int] = Counter()
    for label, rank in zip(labels.tolist(), rank_in_class(labels).tolist(), strict=True):
        assert rank == seen[label]
        seen[label] += 1


# ------------------------------------------------------------------------------------------- augmentation
def shifted(image: torch.Tensor, up: int, left: int) -> list:
    channels, height, width = image.shape
    return [
        [[float(image[c, i + up, j + left]) if 0 <= i + up < height and 0 <= j + left < width else 0.0
          for j in range(width)] for i in range(height)]
        for c in range(channels)
    ]


def test_a_shift_moves_whole_images_by_every_amount():
    images = torch.rand(60, 2, 4, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    moved = shift(images, 1, torch.Generator().manual_seed(2))
    found: Counter[tuple[int, int]] = Counter()
    for image, result in zip(images, moved, strict=True):
        fits = [(u, v) for u in (-1, 0, 1) for v in (-1, 0, 1) if shifted(image, u, v) == result.tolist()]
        assert len(fits) == 1
        found[fits[0]] += 1
    assert len(found) == 9


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.rand(200, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    flipped = flip(images, torch.Generator().manual_seed(2))
    mirrored = 0
    for image, result in zip(images.tolist(), flipped.tolist(), strict=True):
        reverse = [[row[::-1] for row in channel] for channel in image]
        assert result in (image, reverse)
        mirrored += result == reverse
    assert 70 < mirrored < 130


# ------------------------------------------------------------------------------------------------- digits
def test_digits_are_split_for_good_and_by_class():
    from sklearn.datasets import load_digits

    raw = load_digits()
    data = load("digits")
    assert (data.kind, data.num_classes, data.sample_shape) == ("images", 10, (1, 8, 8))
    sizes = {name: len(getattr(data, name)) for name in ("train", "val", "test")}
    assert sum(sizes.values()) == len(raw.target) == 1797
    assert 350 <= sizes["test"] <= 370
    assert 170 <= sizes["val"] <= 190
    total = Counter(raw.target.tolist())
    pixels = data.train.pixels
    restored: Counter[bytes] = Counter()
    for name, fraction in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        inputs, labels = everything(getattr(data, name))
        assert inputs.dtype == torch.float32
        for label, count in Counter(labels.tolist()).items():
            assert abs(count - fraction * total[label]) < 2
        values = (inputs * pixels.std[0] + pixels.mean[0]).round().to(torch.uint8).numpy()
        restored.update(
            value.tobytes() + bytes([label]) for value, label in zip(values, labels.tolist(), strict=True)
        )
    assert restored == Counter(
        image.astype(np.uint8).tobytes() + bytes([label])
        for image, label in zip(raw.images, raw.target.tolist(), strict=True)
    )


def test_digits_are_normalised_by_the_train_split():
    inputs, _ = everything(load("digits").train)
    assert abs(float(inputs.mean())) < 1e-5
    assert abs(float(inputs.std()) - 1) < 1e-5


def test_a_batch_is_a_pure_function_of_indices_and_generator():
    plain, augmented = load("digits"), load("digits", augment=True)
    indices = torch.tensor([5, 5, 0, 1263])
    inputs, labels = plain.train.batch(indices, step_generator(0, 0))
    assert torch.equal(inputs, plain.train.batch(indices)[0])     # no augmentation unless asked
    assert torch.equal(inputs[0], inputs[1])
    assert torch.equal(labels[2:3], plain.train.batch(torch.tensor([0]))[1])
    first, again, other = (augmented.train.batch(indices, step_generator(0, step))[0] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(augmented.train.batch(indices)[0], inputs)
    for split in (augmented.val, augmented.test):
        assert torch.equal(everything(split, step_generator(0, 0))[0], everything(split)[0])


def test_a_data_set_describes_itself():
    text = load("digits").describe()
    assert text.startswith("digits: inputs 1x8x8, 10 classes, 1,264 train")
    assert "the split is fixed and ours" in text


# ----------------------------------------------------------------------------------- cifar10: a stand-in
NUM = 20                                                          # images of each of the six batches


@pytest.fixture(scope="module")
def cifar():
    """Six batches of random images, every class alike often, as plain numpy."""
    random_numbers = np.random.default_rng(0)
    images = random_numbers.integers(0, 256, (6, NUM, 3, 32, 32), dtype=np.uint8)
    labels = np.tile(np.arange(NUM) % 2, (6, 1))
    return images, labels


def names(suffix: str = "") -> list[str]:
    return [*(f"data_batch_{number}{suffix}" for number in range(1, 6)), f"test_batch{suffix}"]


def write_python(folder: Path, cifar) -> None:
    folder.mkdir(parents=True)
    for name, images, labels in zip(names(), *cifar, strict=True):
        content = {"data": images.reshape(NUM, 3072), "labels": labels.tolist(), "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))


def write_binary(folder: Path, cifar) -> None:
    folder.mkdir(parents=True)
    for name, images, labels in zip(names(".bin"), *cifar, strict=True):
        records = [bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        (folder / name).write_bytes(b"".join(records))


def check_cifar(data, cifar) -> None:
    """Test is the sixth batch; of the first five, in order, the 10th, 20th, ... of a class are val."""
    images, labels = cifar
    expected: dict[str, list] = {"train": [], "val": [], "test": []}
    seen: Counter[int] = Counter()
    for batch in range(5):
        for image, label in zip(images[batch], labels[batch].tolist(), strict=True):
            seen[label] += 1
            expected["train" if seen[label] % 10 else "val"].append((image, label))
    expected["test"] = list(zip(images[5], labels[5].tolist(), strict=True))
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    for name, items in expected.items():
        inputs, targets = everything(getattr(data, name))
        assert targets.tolist() == [label for _, label in items]
        oracle = np.stack([(image / 255 - mean) / std for image, _ in items])
        assert np.abs(inputs.numpy() - oracle).max() < 1e-5


@pytest.mark.parametrize("inside", [False, True], ids=["parent", "folder-itself"])
@pytest.mark.parametrize("layout", ["cifar-10-batches-py", "cifar-10-batches-bin"])
def test_cifar10_reads_both_of_its_own_layouts(tmp_path, cifar, layout, inside):
    folder = tmp_path / layout
    (write_python if layout.endswith("py") else write_binary)(folder, cifar)
    data = load(f"cifar10:{folder if inside else tmp_path}")
    check_cifar(data, cifar)
    assert layout in data.describe()


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2's cPickle and an old numpy wrote: the files that everybody downloads."""
    raw = data.tobytes()
    return b"".join([
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03",
        b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01", b"M" + struct.pack("<H", len(data)),
        b"M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN",
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T", struct.pack("<I", len(raw)), raw,
        b"tbU\x06labelsq\x08](", b"".join(b"K" + bytes([label]) for label in labels), b"eu.",
    ])


def test_cifar10_reads_what_python_2_wrote(tmp_path, cifar):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, images, labels in zip(names(), *cifar, strict=True):
        (folder / name).write_bytes(python2_pickle(images.reshape(NUM, 3072), labels.tolist()))
    check_cifar(load(f"cifar10:{tmp_path}"), cifar)


def test_cifar10_is_augmented_unless_refused(tmp_path, cifar):
    write_python(tmp_path / "cifar-10-batches-py", cifar)
    for augment, changes in ((None, True), (True, True), (False, False)):
        data = load(f"cifar10:{tmp_path}", augment=augment)
        plain = everything(data.train)[0]
        assert torch.equal(everything(data.train, step_generator(0, 0))[0], plain) != changes
        assert torch.equal(everything(data.test, step_generator(0, 0))[0], everything(data.test)[0])


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda trap: Evil(os.mkdir, trap), ".mkdir;"),
        (lambda trap: {"data": [Evil(eval, f"__import__('os').mkdir({trap!r})")]}, ".eval;"),
        (lambda trap: Evil(getattr, "text", "upper"), ".getattr;"),
        (lambda trap: np.array([Evil(os.mkdir, trap)], dtype=object), "only n"),
        (lambda trap: Evil(np.dtype, "O8"), "an array of 'O8'"),
        (lambda trap: np.float64(3), "scalar"),
        (lambda trap: torch.zeros(2), "torch"),
        (lambda trap: Evil(np.ndarray, (1 << 40,)), "no readable pickle"),
        (lambda trap: Evil(np.dtype, "V9"), "an array of 'V9'"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path, content, told, protocol):
    trap, path = tmp_path / "sprung", tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content(str(trap)), protocol=protocol))
    with pytest.raises(ValueError, match="data_batch_1: ") as caught:
        read_array_pickle(path)
    assert told in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no readable pickle"),
        (b"\x80\x02", "no readable pickle"),
        (b"no pickle at all", "no readable pickle"),
        (b"\x80\x02.", "no readable pickle"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "memo slot 2147483647 in a file of 9 bytes"),
    ],
    ids=["empty", "cut", "text", "empty-stack", "giant-string", "giant-memo"],
)
def test_a_broken_pickle_is_refused(tmp_path, content, told):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_1: .*{told}"):
        read_array_pickle(path)


def test_numpys_reconstruct_may_only_start_an_empty_array(tmp_path):
    path = tmp_path / "data_batch_1"
    start = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    path.write_bytes(start + b"J\xff\xff\xff\x7f\x85U\x01b\x87R.")
    with pytest.raises(ValueError, match="numpy would not have written"):
        read_array_pickle(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "expected a mapping"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "expected a mapping"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "expected uint8 data"),
        ({"data": np.zeros((2, 100), np.uint8), "labels": [0, 1]}, "expected uint8 data"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "2 images but 1 labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "from 0 to 9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, "1"]}, "from 0 to 9"),
    ],
)
def test_a_batch_that_is_none_is_refused(tmp_path, cifar, content, told):
    write_python(tmp_path / "cifar-10-batches-py", cifar)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(ValueError, match=told) as caught:
        load(f"cifar10:{tmp_path}")
    assert "data_batch_3" in str(caught.value)


@pytest.mark.parametrize("length", [0, 3072, 3073 * 2 - 1])
def test_a_binary_batch_holds_whole_records(tmp_path, cifar, length):
    write_binary(tmp_path / "cifar-10-batches-bin", cifar)
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(bytes(length))
    with pytest.raises(ValueError, match=r"test_batch\.bin: "):
        load(f"cifar10:{tmp_path}")


# ------------------------------------------------------------------------------------- cifar10: jpeg .npz
def test_jpegs_with_one_header_are_read(tmp_path):
    arrays, files = jpeg_arrays()
    np.savez(tmp_path / "few.npz", **arrays)
    images, labels = read_jpeg_npz(tmp_path / "few.npz", size=32)
    assert labels.tolist() == arrays["labels"].tolist()
    for image, file in zip(images, files, strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(file))))


def test_cifar10_reads_the_jpeg_layout(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        np.savez(tmp_path / f"cifar10_{split}_jpeg.npz", **jpeg_arrays(seed=seed)[0])
    data = load(f"cifar10:{tmp_path}")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 20)
    assert "recompressed" in data.describe()


def replaced(**changes):
    return lambda arrays: {key: value for key, value in {**arrays, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (replaced(header=None), 'no array "header"'),
        (replaced(labels=np.zeros(3, np.uint8)), "21 offsets for 3 labels"),
        (replaced(labels=np.zeros((20, 1), np.uint8)), "expected a vector"),
        (replaced(labels=np.zeros(20)), "expected a vector of integer"),
        (replaced(labels=np.array([None] * 20)), "expected a vector of integer"),
        (replaced(header=np.array([b"x"], dtype=object)), "expected a vector of uint8"),
        (lambda a: {**a, "offsets": a["offsets"] + 1}, "offsets run from 1"),
        (lambda a: {**a, "data": a["data"][:-1]}, "expected 0 to"),
        (lambda a: {**a, "offsets": a["offsets"][[0, 1, 2, 3, 2, *range(5, 21)]]}, "offset 4 lies before"),
        (lambda a: {**a, "offsets": a["offsets"][[0, 1, 2, 3, 3, *range(5, 21)]]}, "image 3: "),
        (lambda a: {**a, "header": a["header"][:40]}, "image 0: no readable JPEG"),
        (lambda a: {**a, "header": a["header"][2:]}, "image 0: no readable JPEG"),
    ],
)
def test_an_npz_with_a_fault_is_refused_by_name(tmp_path, change, told):
    np.savez(tmp_path / "few.npz", **change(jpeg_arrays()[0]))
    with pytest.raises(ValueError, match=r"few\.npz: ") as caught:
        read_jpeg_npz(tmp_path / "few.npz", size=32)
    assert told in str(caught.value)


def test_a_jpeg_of_another_size_or_kind_is_refused(tmp_path):
    for image, told in ((np.zeros((16, 16, 3), np.uint8), "RGB 16x16"), (np.zeros((32, 32), np.uint8), "L 32x32")):
        file = jpeg(image)
        arrays = {"header": np.frombuffer(file[:2], np.uint8), "data": np.frombuffer(file[2:], np.uint8),
                  "offsets": np.array([0, len(file) - 2]), "labels": np.zeros(1, np.uint8)}
        np.savez(tmp_path / "one.npz", **arrays)
        with pytest.raises(ValueError, match=f"image 0: {told}, expected RGB 32x32"):
            read_jpeg_npz(tmp_path / "one.npz", size=32)


def test_a_declared_size_is_not_believed(tmp_path):
    path = tmp_path / "hostile.npz"
    np.savez(path, **jpeg_arrays()[0])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    honest = members["data.npy"]
    size = len(jpeg_arrays()[0]["data"])
    members["data.npy"] = honest.replace(f"({size},), }}".encode().ljust(19), b"(1099511627776,), }", 1)
    assert members["data.npy"] != honest
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"declares \[1099511627776\] of uint8 but holds"):
        read_jpeg_npz(path, size=32)


@pytest.mark.parametrize("keep", [0, 10, 500, -30])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / "cut.npz"
    np.savez(path, **jpeg_arrays()[0])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.npz: no readable \.npz file"):
        read_jpeg_npz(path, size=32)


def test_the_real_cifar10(shared_data):
    images, labels = read_jpeg_npz(shared_data / "cifar10" / "cifar10_test_jpeg.npz", size=32)
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 1000)
    assert images.shape == (10_000, 3, 32, 32)
    # The train split's numbers, as the page beside the files gives them, are near enough.
    assert np.abs(images.mean((0, 2, 3)) / 255 - [0.49125, 0.48209, 0.44652]).max() < 0.01
    assert np.abs(images.std((0, 2, 3)) / 255 - [0.24523, 0.24278, 0.26063]).max() < 0.01


# ------------------------------------------------------------------------------------------------- images
def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (6, 6)) -> dict[str, np.ndarray]:
    """PNG files SPLIT/CLASS/N.png of random pixels, and what was written by path."""
    written = {}
    random_numbers = np.random.default_rng(0)
    for place, count in counts.items():
        (root / place).mkdir(parents=True)
        for number in range(count):
            pixels = random_numbers.integers(0, 256, (*size, 3), dtype=np.uint8)
            name = f"{place}/{number:03}.png"
            Image.fromarray(pixels).save(root / name)
            written[name] = pixels
    return written


def pixels_of(inputs: torch.Tensor) -> np.ndarray:
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((inputs.numpy() * std + mean) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def test_a_folder_a_class(tmp_path):
    counts = {f"{split}/{name}": 3 for split in ("train", "val", "test") for name in ("cat", "ant")}
    written = write_images(tmp_path, counts)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = load(f"images:{tmp_path}")
    assert (data.num_classes, data.sample_shape, data.notes) == (2, (3, 6, 6), ())
    for split in ("train", "val", "test"):
        inputs, labels = everything(getattr(data, split))
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]              # ant, cat: sorted
        expected = [written[f"{split}/{name}/{number:03}.png"] for name in ("ant", "cat") for number in range(3)]
        assert np.array_equal(pixels_of(inputs), np.stack(expected))


def test_a_missing_val_is_split_off_train_and_said(tmp_path):
    write_images(tmp_path, {"train/a": 20, "train/b": 10, "test/a": 1})
    data = load(f"images:{tmp_path}")
    assert data.val.files.names == ("a/009.png", "a/019.png", "b/009.png")
    assert (len(data.train), len(data.test)) == (27, 1)
    assert not set(data.train.files.names) & set(data.val.files.names)
    assert "val is every tenth training image" in data.describe()


def test_a_missing_test_is_val_and_said(tmp_path):
    write_images(tmp_path, {"train/a": 10, "train/b": 10, "val/a": 4})
    data = load(f"images:{tmp_path}")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 4)
    assert "val/ is the test split" in data.describe()


def test_images_are_brought_to_one_size(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / split / "red").mkdir(parents=True)
        Image.new("RGB", (12, 6), (255, 0, 0)).save(tmp_path / split / "red" / "wide.png")
        Image.new("L", (5, 9), 200).save(tmp_path / split / "red" / "tall.jpg")
    (tmp_path / "train" / "tan").mkdir()
    Image.new("RGB", (4, 4), (210, 180, 140)).save(tmp_path / "train" / "tan" / "square.png")
    with pytest.raises(ValueError, match=r"tall\.jpg: 5x9 is not square; say which size"):
        load(f"images:{tmp_path}")
    data = load(f"images:{tmp_path}", image_size=4)
    inputs, _ = everything(data.test)
    tall, wide = pixels_of(inputs)
    assert inputs.shape == (2, 3, 4, 4)
    assert (wide == [255, 0, 0]).all()
    assert (tall == 200).all()


def test_images_are_augmented_in_training_alone(tmp_path):
    write_images(tmp_path, {"train/a": 12, "train/b": 1, "val/a": 12, "test/a": 1}, size=(8, 8))
    for augment in (None, True, False):
        data = load(f"images:{tmp_path}", augment=augment)
        same = torch.equal(everything(data.train, step_generator(0, 0))[0], everything(data.train)[0])
        assert same == (augment is False)
        assert torch.equal(everything(data.val, step_generator(0, 0))[0], everything(data.val)[0])


def test_a_corrupt_image_is_named(tmp_path):
    write_images(tmp_path, {"train/a": 3, "train/b": 1, "val/a": 1, "test/a": 1})
    bad = tmp_path / "train" / "a" / "001.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = load(f"images:{tmp_path}")
    data.train.batch(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"001\.png: no readable image"):
        everything(data.train)


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"train/a": 1, "train/b": 0, "val/a": 1, "test/a": 1}, "b: a class without images"),
        ({"train/a": 1, "val/a": 1, "val/z": 1, "test/a": 1}, "classes that train/ does not have: z"),
        ({"train/a": 1, "val/a": 0, "test/a": 1}, "val: no images"),
        ({"train/a": 9, "train/b": 9, "test/a": 1}, "no class of train/ has the ten images"),
    ],
)
def test_a_folder_with_a_fault_is_refused(tmp_path, counts, told):
    write_images(tmp_path, counts)
    with pytest.raises(ValueError, match=told):
        load(f"images:{tmp_path}")


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_blends_every_image_with_a_partner(alpha):
    images = torch.randn(9, 3, 4, 5)
    parts = []
    for seed in range(300):
        mixed, order, part = mix(images, alpha, torch.Generator().manual_seed(seed))
        parts.append(part)
        assert sorted(order.tolist()) == list(range(9))
        for place, partner in enumerate(order.tolist()):
            torch.testing.assert_close(mixed[place], images[partner] + part * (images[place] - images[partner]))
        if seed == 7:
            again = mix(images, alpha, torch.Generator().manual_seed(seed))
            assert torch.equal(again[0], mixed)
            assert again[2] == part
    assert 0 <= min(parts) < max(parts) <= 1
    assert np.mean(parts) == pytest.approx(0.5, abs=0.08)
    assert np.var(parts) == pytest.approx(0.25 / (2 * alpha + 1), rel=0.25)      # that of Beta(α, α)


# --------------------------------------------------------------------------------------------------- text
TEXT = "".join(random.Random(0).choices("abcdeÄ\n🙂", k=160)) + "Z" * 40


def test_windows_of_text_are_slices_of_it(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode())
    data = load(f"text:{path}", context=5)
    alphabet = sorted(set(TEXT[:160]))
    assert (data.kind, data.sample_shape, data.num_classes) == ("text", (5,), len(alphabet) + 1)
    assert data.files == {"alphabet.txt": "".join(alphabet).encode()}
    parts = {"train": (TEXT[:160], 1), "val": (TEXT[160:180], 5), "test": (TEXT[180:], 5)}
    for name, (part, stride) in parts.items():
        starts = [start for start in range(0, len(part), stride) if start + 5 < len(part)]
        split = getattr(data, name)
        assert len(split) == len(starts)
        inputs, targets = everything(split)
        tokens = [alphabet.index(c) + 1 if c in alphabet else 0 for c in part]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == [tokens[start : start + 5] for start in starts]
        assert targets.tolist() == [tokens[start + 1 : start + 6] for start in starts]


def test_a_packed_text_is_the_same_text(tmp_path):
    (tmp_path / "book.txt").write_bytes(TEXT.encode())
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    plain, packed = (load(f"text:{tmp_path / name}", context=7) for name in ("book.txt", "book.txt.gz"))
    assert torch.equal(plain.train.tokens, packed.train.tokens)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("book.txt", b"abc" * 10, "3 characters of val; each part must be longer than the context of 5"),
        ("book.txt", b"abc\xff", "no UTF-8 text at byte 3"),
        ("book.txt", b"", "0 characters"),
        ("book.txt.gz", b"not packed", "cannot be read"),
        ("book.txt.gz", gzip.compress(bytes(1000), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        load(f"text:{tmp_path / name}", context=5)


def test_a_folder_has_a_file_for_each_part(tmp_path):
    """Characters are counted in train alone; in val and test what it lacks is unknown."""
    for name, text in (("train", "abcabcab"), ("valid", "abzabz"), ("test", "cbacba")):
        (tmp_path / f"wiki.{name}.tokens").write_text(text)
    data = load(f"text:{tmp_path}", context=3)
    assert [part.tokens.tolist() for part in (data.train, data.val, data.test)] == [
        [1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 0, 1, 2, 0], [3, 2, 1, 3, 2, 1],
    ]  # fmt: skip
    assert "wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens" in data.describe()
    (tmp_path / "other.test.tokens").write_text("abc")
    with pytest.raises(FileNotFoundError, match=r"one file with test in its name.*other.test.tokens and wiki.test.tok"):
        load(f"text:{tmp_path}", context=3)
    for file in tmp_path.glob("*test*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"with test in its name, plain or .gz \(it holds none\)"):
        load(f"text:{tmp_path}", context=3)


def test_text_by_a_tokenizer_is_what_it_cuts(tmp_path):
    """Nothing is added at the seams of lines, and no window knows of them."""
    pytest.importorskip("transformers", reason="tokenizers come with transformers, which is an extra")
    from language import WORDS, bert_folder

    bert = bert_folder(tmp_path / "bert", weights=False)
    words = random.Random(1).choices(WORDS, k=100)
    (tmp_path / "book.txt").write_text("".join(w + ("\n" if i % 7 == 6 else " ") for i, w in enumerate(words)))
    data = load_data(DataConfig(name="text", path=str(tmp_path / "book.txt"), context=4), str(bert))
    assert (data.num_classes, data.unit) == (5 + len(WORDS), "tokens")
    found = torch.cat([data.train.tokens, data.val.tokens, data.test.tokens]).tolist()
    assert found[: len(data.train.tokens)] == [5 + WORDS.index(w) for w in words[: len(data.train.tokens)]]
    assert 70 <= len(data.train.tokens) <= 90


def test_a_text_too_large_is_refused_before_it_is_unpacked_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("nmflow.train.data.text.MAX_BYTES", 1000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"a" * 1001))
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        load(f"text:{tmp_path / 'bomb.gz'}")


def test_the_real_tinyshakespeare(shared_data):
    data = load(f"text:{shared_data / 'lm_text' / 'tinyshakespeare.txt.gz'}")
    assert data.num_classes == 66                                 # 65 distinct characters, and unknown
    assert sum(len(s.tokens) for s in (data.train, data.val, data.test)) == 1_115_394
    assert data.sample_shape == (128,)


def test_the_real_wikitext(tmp_path, shared_data):
    """WikiText-2's own validation and test files; the first stands in for its train file as well."""
    source = shared_data / "lm_text"
    for part, file in (("train", "valid"), ("valid", "valid"), ("test", "test")):
        if not (source / f"wikitext2.{file}.tokens.gz").is_file():
            pytest.skip(f"no WikiText-2 at {source}")
        (tmp_path / f"wiki.{part}.tokens.gz").symlink_to(source / f"wikitext2.{file}.tokens.gz")
    data = load(f"text:{tmp_path}")
    text = gzip.decompress((source / "wikitext2.test.tokens.gz").read_bytes()).decode()
    assert torch.equal(data.train.tokens, data.val.tokens)
    assert len(data.test.tokens) == len(text)
    assert len(text.split()) + text.count("\n") == 245_569           # the official count has an <eos> a line
    known = data.files["alphabet.txt"].decode()
    assert data.test.tokens[:50].tolist() == [known.index(character) + 1 for character in text[:50]]


# ------------------------------------------------------------------------------------------------ missing
@pytest.mark.parametrize(
    ("text", "layout"),
    [("cifar10:nowhere", "cifar-10-batches-py"), ("cifar10:nowhere", "cifar10_train_jpeg.npz"),
     ("cifar10:nowhere", "curl -O .*cifar-10-python.tar.gz"), ("images:nowhere", "train/CLASS"),
     ("images:nowhere", "curl -O .*tiny-imagenet-200.zip"), ("images:nowhere", "https://image-net.org/"),
     ("text:nowhere", "UTF-8 text file"),
     ("text:nowhere.txt", "curl -L --create-dirs -o nowhere.txt https:"),
     ("text:nowhere.txt.gz", "curl -L --create-dirs -o nowhere.txt https:")],
)
def test_missing_data_are_told_with_the_layout_expected(text, layout):
    with pytest.raises(FileNotFoundError, match=f"nowhere.*: not found; expected .*{layout}"):
        load(text)


def test_an_incomplete_download_names_the_missing_batch(tmp_path, cifar):
    write_python(tmp_path / "cifar-10-batches-py", cifar)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4: not found; expected all of"):
        load(f"cifar10:{tmp_path}")


def test_a_packed_jpeg_of_too_many_pixels_is_refused() -> None:
    """65,000 x 65,000 in the header of a file of a few hundred bytes."""
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "JPEG")
    content = bytearray(file.getvalue())
    sizes = content.index(b"\xff\xc0") + 5
    content[sizes : sizes + 4] = (65_000).to_bytes(2, "big") * 2
    with pytest.raises(ValueError, match=r"image 3: no readable JPEG: .*decompression bomb"):
        _size_of(bytes(content), "image 3")
