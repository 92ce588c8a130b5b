"""The data sets: splits, preprocessing, augmentation, and damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gradprobe.errors import ArgumentError
from gradprobe.experiments.data import augment, load

RECORD = 3073
REAL_CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar-10-batches-bin"


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture
def cifar(tmp_path):
    """A small set in the standard layout: two training files and a test file."""
    rng = np.random.default_rng(0)
    for name, count in {"data_batch_1.bin": 7, "data_batch_2.bin": 5, "test_batch.bin": 3}.items():
        records = rng.integers(0, 256, (count, RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 10
        records.tofile(tmp_path / name)
    return tmp_path


def test_digits_are_split_by_class_always_the_same_way(digits):
    again = load("digits")
    assert digits.train_x.shape == (1347, 1, 8, 8)
    assert digits.test_x.shape == (450, 1, 8, 8)
    shares = digits.test_y.bincount(minlength=10) / digits.train_y.bincount(minlength=10)
    assert shares.min() > 0.31
    assert shares.max() < 0.36
    assert again.sha256 == digits.sha256
    assert not digits.augmented


def test_the_training_mean_is_subtracted_from_both_sets(digits):
    assert digits.train_x.mean(dim=0).abs().max() < 1e-6
    # The test set was not centred by its own mean.
    assert digits.test_x.mean(dim=0).abs().max() > 1e-3


def test_cifar_files_are_read_in_order_planes_and_scale(cifar):
    data = load(f"cifar10:{cifar}")
    raw = np.concatenate([np.fromfile(cifar / f"data_batch_{i}.bin", dtype=np.uint8) for i in (1, 2)])
    pixels = raw.reshape(-1, RECORD)[:, 1:].reshape(-1, 3, 32, 32) / 255
    assert data.train_x.shape == (12, 3, 32, 32)
    assert data.train_y.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    np.testing.assert_allclose(data.train_x, pixels - pixels.mean(axis=0), atol=1e-6)
    assert (data.num_classes, data.in_channels, data.augmented) == (10, 3, True)
    assert "data_batch_1.bin, data_batch_2.bin, test_batch.bin" in data.summary


def test_the_spec_of_a_loaded_set_works_from_any_folder(cifar, monkeypatch):
    monkeypatch.chdir(cifar)
    data = load("cifar10:.")
    monkeypatch.chdir("/")
    assert load(data.spec).sha256 == data.sha256


def test_the_archives_own_folder_is_found(cifar, tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    (outer / "cifar-10-batches-bin").symlink_to(cifar)
    assert len(load(f"cifar10:{outer}").train_x) == 12


def test_a_changed_pixel_changes_the_hash(cifar):
    before = load(f"cifar10:{cifar}").sha256
    path = cifar / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert load(f"cifar10:{cifar}").sha256 != before


@pytest.mark.parametrize("cut", [1, 100, RECORD - 1], ids=["one-byte", "hundred", "all-but-one"])
def test_a_truncated_file_is_rejected_with_both_sizes(cifar, cut):
    path = cifar / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    message = f"{path} is damaged or truncated: needed a multiple of 3,073 bytes .*found {5 * RECORD - cut:,}"
    with pytest.raises(ArgumentError, match=message):
        load(f"cifar10:{cifar}")


def test_an_empty_file_is_rejected(cifar):
    (cifar / "test_batch.bin").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"test_batch\.bin is damaged or truncated.*found 0"):
        load(f"cifar10:{cifar}")


def test_a_label_above_nine_is_rejected(cifar):
    path = cifar / "data_batch_1.bin"
    content = bytearray(path.read_bytes())
    content[4 * RECORD] = 77
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"data_batch_1\.bin is damaged: needed labels 0 to 9, found 77 at image 4"):
        load(f"cifar10:{cifar}")


def test_missing_files_are_listed(cifar, tmp_path):
    (cifar / "test_batch.bin").unlink()
    with pytest.raises(ArgumentError, match=r"has no test_batch\.bin$"):
        load(f"cifar10:{cifar}")
    with pytest.raises(ArgumentError, match=r"not a folder.*data_batch_1\.bin, .*data_batch_5\.bin, test_batch\.bin"):
        load(f"cifar10:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("spec", ["", "mnist", "Digits", "digits:x", "hf", "imagefolder:", "cifar10", "cifar10:"])
def test_an_unknown_set_is_rejected_with_the_known_ones(spec):
    with pytest.raises(ArgumentError, match="cifar10:DIR"):
        load(spec)


def test_augmentation_crops_pads_and_flips():
    images = torch.arange(1.0, 1 + 200 * 3 * 36).reshape(200, 3, 6, 6)
    augmented = augment(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, source in zip(augmented, padded, strict=True):
        candidates = {
            (top, left, flipped): source[:, top : top + 6, left : left + 6]
            for top in range(9)
            for left in range(9)
            for flipped in (False, True)
        }
        found = [key for key, crop in candidates.items() if torch.equal(image, crop.flip(2) if key[2] else crop)]
        assert found
        seen.update(found[:1])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flipped for _, _, flipped in seen} == {False, True}


def test_augmentation_depends_only_on_its_generator():
    images = torch.rand(16, 3, 8, 8)
    first = augment(images, torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    assert torch.equal(first, augment(images, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(6)))


@pytest.mark.skipif(not REAL_CIFAR.is_dir(), reason="needs ../shared/data/cifar-10-batches-bin beside the repository")
def test_the_real_subset_is_balanced():
    data = load(f"cifar10:{REAL_CIFAR}")
    assert data.train_y.bincount().tolist() == [500] * 10
    assert data.test_y.bincount().tolist() == [100] * 10
    assert 0.2 < data.train_x.std() < 0.3
