"""What training changes in images beyond shifts and flips: timm's policies against timm itself, and random erasing."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folders import photograph, write_packed
from PIL import Image
from scipy import stats

from nmflow.train.config import load_config
from nmflow.train.config_policy import check_policy
from nmflow.train.config_sections import DataConfig
from nmflow.train.data import load_data, share, step_generator
from nmflow.train.data.augment import erase
from nmflow.train.data.policy import Policy, timm_policy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICIES = (
    "rand-m9-mstd0.5", "rand-m15-n2", "rand-m9-n3-p0.7-mmax20-inc1", "rand-m7-tweights", "augmix-m5-w4-d2",
    "original-mstd0.5", "v0r",
)  # fmt: skip
SIZE = 48


def timms(text: str) -> Any:
    """What timm's own training does to a PIL image between flipping and scaling it."""
    factory = pytest.importorskip("timm.data.transforms_factory", reason="timm is not installed")
    settings = {"interpolation": "random", "mean": MEAN, "std": STD, "separate": True}
    return factory.transforms_imagenet_train(SIZE, auto_augment=text, **settings)[1]


def ours(text: str) -> Policy:
    pytest.importorskip("timm", reason="timm is not installed")
    return timm_policy(text, tuple(255 * value for value in MEAN))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Bytes [12, 3, SIZE, SIZE]."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([np.asarray(photograph(rng, SIZE, SIZE)).transpose(2, 0, 1) for _ in range(12)]))


# ------------------------------------------------------------------------------------------------- policies
@pytest.mark.parametrize("text", POLICIES)
def test_a_policy_is_timms_begun_at_seeds_of_the_generator(images: torch.Tensor, text: str) -> None:
    found = ours(text)(images, torch.Generator().manual_seed(3))
    seeds = torch.randint(2**32, (12,), generator=torch.Generator().manual_seed(3)).tolist()
    transform = timms(text)
    for image, result, seed in zip(images, found, seeds, strict=True):
        random.seed(seed)
        np.random.seed(seed)
        wanted = np.asarray(transform(Image.fromarray(image.permute(1, 2, 0).numpy())))
        assert np.array_equal(result.permute(1, 2, 0).numpy(), wanted)
    assert not torch.equal(found, images)


def test_global_streams_neither_matter_nor_move(images: torch.Tensor) -> None:
    policy = ours("rand-m9-mstd0.5")
    first = policy(images, torch.Generator().manual_seed(0))
    random.seed(1)
    np.random.seed(1)
    python, numpy = random.getstate(), np.random.get_state()
    assert torch.equal(policy(images, torch.Generator().manual_seed(0)), first)
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert not torch.equal(policy(images, torch.Generator().manual_seed(1)), first)

    def fails(image: Image.Image) -> Image.Image:
        random.random()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Policy(fails)(images, torch.Generator().manual_seed(0))
    assert random.getstate() == python


def test_shares_of_a_batch_are_alike_whoever_reads_them_and_when(tmp_path: Path) -> None:
    """Two processes, or one with two micro-batches, one after the other or the other way round."""
    pytest.importorskip("timm", reason="timm is not installed")
    write_packed(tmp_path, "cifar10", {"train": 40, "test": 10})
    config = DataConfig(name="cifar10", path=str(tmp_path), augment="rand-m9-mstd0.5", erase=0.5)
    data, indices = load_data(config), torch.arange(8)

    def read(process: int, processes: int, micro: int, rounds: int) -> torch.Tensor:
        part = share(8, process, processes, micro, rounds)
        random.seed(process)
        np.random.seed(process)
        torch.manual_seed(process)
        return data.train.batch(indices[part], step_generator(0, 5, part.start))[0]

    of_processes = [read(process, 2, 0, 1) for process in (1, 0)][::-1]
    of_micro_batches = [read(0, 1, micro, 2) for micro in (0, 1)]
    for one, two in zip(of_processes, of_micro_batches, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(of_processes[0], data.train.batch(indices[:4])[0])


def test_val_and_test_are_left_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    write_packed(tmp_path, "some", {"train": 40, "val": 10})
    plain, changed = (
        load_data(DataConfig(name="images", path=str(tmp_path), **settings))
        for settings in ({"augment": False}, {"augment": "rand-m9", "erase": 1.0})
    )
    for name in ("val", "test"):
        items = torch.arange(len(getattr(plain, name)))
        unchanged, _ = getattr(plain, name).batch(items, step_generator(0, 0))
        assert torch.equal(getattr(changed, name).batch(items, step_generator(0, 0))[0], unchanged)
    assert torch.equal(plain.train.batch(items, step_generator(0, 0))[0], plain.train.batch(items)[0])


@pytest.mark.parametrize(
    "text", ["rand-m0-n9-p1", "rand-m10-n9-p1-inc1", "rand-m30-n9-p1-mmax30-inc1", "augmix-m10-w9"]
)
def test_the_ends_of_the_scale_are_no_end_of_the_run(images: torch.Tensor, text: str) -> None:
    """There timm posterizes to 0 bits or fewer, which newer Pillows refuse: black, as it was."""
    found = ours(text)(images.repeat(20, 1, 1, 1), torch.Generator().manual_seed(0))
    assert text.startswith("augmix") or any(len(image.unique()) == 1 for image in found)


@pytest.mark.parametrize("text", [*POLICIES, "3a", "rand", "v0-mstd1", "rand-m9-mstd0.5-inc1"])
def test_policies_that_are_taken_are_built(text: str) -> None:
    assert load_config(None, ["data=cifar10:here", f"data.augment={text}"]).data.augment == text
    ours(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("randm9", 'expected true, false or a policy of timm .*, found "randm9"'),
        ("yes", 'expected true, false or a policy of timm .*, found "yes"'),
        ("rand-m9-", '"" is no word of rand'),
        ("rand-m", '"m" is no word'),
        ("rand-m9.5", '"m9.5" is no word'),
        ("rand-mstd.5", '"mstd.5" is no word'),
        ("rand-p1.5", '"p1.5" is no word'),
        ("rand-n0", '"n0" is no word'),
        ("rand-tmany", '"tmany" is no word'),
        ("rand-m9-foo", '"foo" is no word of rand; it has m, n, p'),
        ("rand-m9-m5", "m stands twice"),
        ("original-m9", '"m9" is no word of original; it has mstd'),
        ("augmix-w0", '"w0" is no word of augmix'),
    ],
)
def test_a_policy_that_timm_would_misread_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_policy(text)
    with pytest.raises(ValueError, match=rf"data\.augment: .*{told}"):
        load_config(None, ["data=cifar10:here", f"data.augment={text}"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data.augment=rand-m9"], "rand-m9 is for colour, and digits are grey"),
        (["data=cifar10:here", "data.augment=9"], "data.augment: expected true, false or a policy of timm"),
        (["data=cifar10:here", "data.erase=0"], "data.erase: expected a value > 0"),
        (["data=text:here", "data.erase=0.5"], "erase is of no use to text"),
    ],
)
def test_augmentation_that_does_not_fit_is_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_config(None, arguments)


def test_without_timm_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(tmp_path, "some", {"train": 40, "val": 10})
    monkeypatch.setitem(__import__("sys").modules, "timm.data", None)
    with pytest.raises(ValueError, match=r"data\.augment: rand-m9 is a policy of timm's: pip install 'nmflow\[timm\]'"):
        load_data(DataConfig(name="images", path=str(tmp_path), augment="rand-m9"))


# -------------------------------------------------------------------------------------------------- erasing
def test_erasing_overwrites_one_rectangle_with_noise() -> None:
    images = torch.full((400, 3, 40, 60), 9.0)  # nine standard deviations away from any noise
    erased = erase(images, 0.3, torch.Generator().manual_seed(0))
    again = erase(images, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(erased, again)
    assert bool((images == 9).all())
    boxes, noise = [], []
    for image in erased:
        changed = (image != 9).all(dim=0)
        assert bool(((image != 9).any(dim=0) == changed).all())  # all channels alike
        if changed.any():
            rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
            top, bottom, left, right = (int(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
            assert bool(changed[top:bottom, left:right].all())
            boxes.append((bottom - top, right - left))
            noise.append(image[:, top:bottom, left:right].flatten())
    assert 90 <= len(boxes) <= 150
    for height, width in boxes:
        assert 0.02 * 2400 * 0.8 <= height * width <= 2400 / 3 * 1.1  # rounded edges
        assert 0.3 / 1.4 <= width / height <= 1.4 / 0.3
    areas = [height * width / 2400 for height, width in boxes]
    assert stats.kstest(areas, stats.uniform(0.02, 1 / 3 - 0.02).cdf).pvalue > 0.01
    values = torch.cat(noise)
    assert float(values.mean()) == pytest.approx(0, abs=4 / math.sqrt(len(values)))
    assert float(values.std()) == pytest.approx(1, abs=0.02)
