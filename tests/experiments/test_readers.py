"""Every kind of data: what is read, how it is divided, cut and scaled, and files that cannot be used."""

import numpy as np
import pytest
import torch

from gradprobe.errors import ArgumentError
from gradprobe.experiments.data import DataSpec, load


def save(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def centred(train, test):
    mean = train.mean(axis=0)
    return train - mean, test - mean


def test_cifar100_is_read_by_its_fine_labels(tmp_path):
    rng = np.random.default_rng(0)
    fine = {"train.bin": np.array([0, 99, 42, 7]), "test.bin": np.array([42, 3])}
    for name, labels in fine.items():
        records = rng.integers(0, 256, (len(labels), 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = 5, labels
        records.tofile(tmp_path / name)
    data = load(f"cifar100:{tmp_path}")
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 99, 42, 7], [42, 3])
    assert (data.num_classes, data.augmented, data.train_x.shape) == (100, True, (4, 3, 32, 32))
    pixels = np.fromfile(tmp_path / "test.bin", dtype=np.uint8).reshape(2, -1)[:, 2:].reshape(2, 3, 32, 32)
    np.testing.assert_allclose(np.diff(data.test_x, axis=0)[0], (pixels[1] / 255 - pixels[0] / 255), atol=1e-6)
    (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-1])
    message = r"train\.bin is damaged or truncated: needed a multiple of 3,074 bytes \(2 labels .*found 12,295"
    with pytest.raises(ArgumentError, match=message):
        load(f"cifar100:{tmp_path}")


def test_an_npz_with_a_test_set_is_read_as_it_is(tmp_path):
    x_train, x_test = np.random.default_rng(0).normal(5, 3, (2, 6, 3, 4, 4))
    source = save(tmp_path / "f.npz", x_train=x_train, y_train=[0, 1, 2, 0, 1, 2], x_test=x_test, y_test=[3] * 6)
    data = load(source)
    for got, wanted in zip((data.train_x, data.test_x), centred(x_train, x_test), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert (data.name, data.num_classes, data.augmented) == ("npz:f.npz", 4, False)
    assert data.summary == "npz:f.npz: 6 training and 6 test images of 3x4x4 from f.npz"


@pytest.mark.parametrize(
    ("shape", "read_as"),
    [((8, 5, 6), (1, 5, 6)), ((8, 5, 6, 3), (3, 5, 6)), ((8, 1, 5, 6), (1, 5, 6)), ((8, 20), (20,))],
    ids=["grey", "channels-last", "channels-first", "features"],
)
def test_every_fourth_example_of_a_class_is_a_test_example(tmp_path, shape, read_as):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    y = np.array([0, 1, 0, 1, 0, 1, 0, 1], dtype=np.uint8)
    data = load(save(tmp_path / "f.npz", x=x, y=y))
    assert data.train_x.shape == (6, *read_as)
    whole = torch.from_numpy(np.moveaxis(x, -1, 1) if shape[-1] == 3 else x).reshape(8, *read_as) / 255
    wanted = centred(whole[:6].numpy(), whole[6:].numpy())
    np.testing.assert_allclose(data.train_x, wanted[0], atol=1e-6)
    np.testing.assert_allclose(data.test_x, wanted[1], atol=1e-6)
    assert data.test_y.tolist() == [0, 1]


RIGHT = {"x": np.zeros((8, 3, 4, 4), np.float32), "y": np.arange(8) % 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None, "labels": np.arange(8)}, "needed the arrays x and y, or x_train, .* found x, labels$"),
        ({"x": np.zeros((8, 3, 4, 4), np.int64)}, "needed uint8 or floating point numbers in x, got int64"),
        ({"x": np.full((8, 3, 4, 4), np.nan)}, "needed finite numbers in x, got NaN or infinity at example 0"),
        ({"x": np.zeros((8, 7, 4, 7), np.float32)}, r"needed 1, 3 or 4 channels in x, .* got \[8, 7, 4, 7\]"),
        ({"x": np.zeros(8, np.float32)}, r"needed x of shape .* got \[8\]"),
        ({"x": np.array([{}] * 8)}, r"f\.npz is damaged or no \.npz file: ValueError: Object arrays"),
        ({"y": np.arange(7)}, r"needed y of shape \[8\], one label for each of x, got \[7\]"),
        ({"y": np.arange(8) / 2}, "needed whole numbers from 0 in y, got float64"),
        ({"y": np.arange(8) - 1}, "needed labels from 0 without large gaps in y, got -1"),
        ({"y": np.arange(8) * 100}, "needed labels from 0 without large gaps in y, got 700"),
        ({"y": np.arange(8)}, "has no test set, .* needed at least 4 examples of a class, got 1"),
    ],
    ids=["names", "dtype", "nan", "channels", "shape", "object", "length", "floats", "negative", "gaps", "no-test"],
)
def test_an_npz_that_cannot_be_used_is_named_with_what_was_needed(tmp_path, change, message):
    arrays = {name: value for name, value in {**RIGHT, **change}.items() if value is not None}
    with pytest.raises(ArgumentError, match=message):
        load(save(tmp_path / "f.npz", **arrays))


def of_many_classes(last_test_label):
    """200 training images of 100 classes, and 50 test images, which have the last 49 of these classes and one more."""
    y_test = np.append(np.arange(51, 100), last_test_label)
    x_train, x_test = (np.zeros((count, 3, 4, 4), np.float32) for count in (200, 50))
    return {"x_train": x_train, "y_train": np.arange(200) % 100, "x_test": x_test, "y_test": y_test}


def test_a_test_set_may_have_fewer_images_than_there_are_classes(tmp_path):
    data = load(save(tmp_path / "f.npz", **of_many_classes(3)))
    assert (len(data.test_y), data.num_classes) == (50, 100)


def test_a_label_above_the_number_of_all_images_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="needed labels from 0 without large gaps in y_test, got 250"):
        load(save(tmp_path / "f.npz", **of_many_classes(250)))


@pytest.mark.parametrize("damage", ["cut", "text", "flipped", "missing", "folder"])
def test_a_damaged_npz_is_named(tmp_path, damage):
    path = tmp_path / "f.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((8, 3, 4, 4)), y=RIGHT["y"])
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "flipped":
        content[300] ^= 0xFF
        path.write_bytes(content)
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(ArgumentError, match=rf"data: .*{path}"):
        load(f"npz:{path}")


def test_images_are_scaled_and_the_middle_is_kept(tmp_path):
    x = np.zeros((8, 1, 4, 12), np.float32)
    x[:, :, :, 4:8] = 1
    x[0] = 0  # so that the mean differs from the images
    data = load(DataSpec(save(tmp_path / "f.npz", x=x, y=RIGHT["y"]), image_size=2))
    assert data.train_x.shape == (6, 1, 2, 2)
    difference = data.train_x[1] - data.train_x[0]
    assert difference.min() > 0.7  # bright: the middle, with a little of its dark neighbours


def test_per_class_limits_both_sets_and_keeps_the_first(tmp_path):
    x = np.arange(24, dtype=np.float32)[:, None] * np.ones((24, 2), np.float32)
    y = np.repeat([0, 1], [4, 20])
    data = load(DataSpec(save(tmp_path / "f.npz", x=x, y=y), per_class=2))
    assert data.train_y.tolist() == [0, 0, 1, 1]
    assert data.test_y.tolist() == [0, 1, 1]
    assert (data.train_x[:, 0] + 2.5).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("option", ["image_size", "per_class"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0])
def test_sizes_are_whole_numbers(option, value):
    with pytest.raises(ArgumentError, match=f"{option}: needed a whole number of at least 1, got {value}"):
        DataSpec("digits", **{option: value})


@pytest.mark.parametrize("option", [{"image_size": 4}, {"augment": True}], ids=lambda option: next(iter(option)))
def test_features_cannot_be_treated_as_images(tmp_path, option):
    source = save(tmp_path / "f.npz", x=np.zeros((8, 5), np.float32), y=RIGHT["y"])
    with pytest.raises(ArgumentError, match=rf"{next(iter(option))}: needed images, got features of shape \[\d, 5\]"):
        load(DataSpec(source, **option))


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of pictures, one colour per class; returns a function that takes the tree and mode."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow, which gradprobe[images] installs")

    def make(tree, mode="RGB", size=(6, 4)):
        for folder, count in tree.items():
            (tmp_path / folder).mkdir(parents=True)
            for number in range(count):
                level = 40 * (sorted(tree).index(folder) + 1) + number
                colour = level if mode == "L" else (level, 0, 255 - level)
                image.new(mode, size, colour).save(tmp_path / folder / f"{number}.png")
        return tmp_path

    return make


def test_a_folder_of_pictures_is_read_by_class(pictures):
    folder = pictures({"train/cat": 3, "train/dog": 2, "val/dog": 1})
    (folder / "train" / "cat" / "notes.txt").write_text("not a picture")
    data = load(f"imagefolder:{folder}")
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 0, 0, 1, 1], [1])
    assert (data.train_x.shape, data.num_classes, data.augmented) == ((5, 3, 4, 6), 2, False)
    red = data.train_x[:, 0, 0, 0] * 255
    np.testing.assert_allclose(red - red[0], [0, 1, 2, 40, 41], atol=1e-3)


def test_a_folder_without_a_test_set_is_divided_and_grey_stays_grey(pictures):
    folder = pictures({"a": 5, "b": 4}, mode="L", size=(9, 9))
    data = load(DataSpec(f"imagefolder:{folder}", image_size=3, per_class=2))
    assert (data.train_x.shape, data.test_x.shape) == ((4, 1, 3, 3), (2, 1, 3, 3))
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 0, 1, 1], [0, 1])


def test_damaged_and_unequal_pictures_are_named(pictures):
    folder = pictures({"a": 4, "b": 4})
    path = folder / "b" / "2.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArgumentError, match=rf"{path} is damaged: needed a picture, got"):
        load(f"imagefolder:{folder}")
    path.write_bytes(b"")
    with pytest.raises(ArgumentError, match=rf"{path} is damaged: needed a picture, got UnidentifiedImageError"):
        load(f"imagefolder:{folder}")
    pictures({"c": 1}, size=(5, 5))
    path.write_bytes((folder / "c" / "0.png").read_bytes())
    (folder / "c" / "0.png").unlink()
    (folder / "c").rmdir()
    with pytest.raises(ArgumentError, match=rf"image_size: needed a size, .* has 4x6 pixels, {path} has 5x5"):
        load(f"imagefolder:{folder}")
    assert load(DataSpec(f"imagefolder:{folder}", image_size=4)).train_x.shape == (6, 3, 4, 4)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": 4}, "needed a folder per class in .*, at least 2, found 1"),
        ({"a": 4, "b": 0}, r"needed pictures \(\.bmp, .*\) in .*b, found none"),
        ({"train/a": 4, "train/b": 4}, "needed beside .*train one of test, val, valid, validation, found none"),
        ({"train/a": 1, "train/b": 1, "test/c": 1}, "only classes of the training set, found c"),
    ],
    ids=["one-class", "empty-class", "no-test", "unknown-class"],
)
def test_a_folder_of_another_form_is_rejected(pictures, tree, message):
    folder = pictures(tree)
    with pytest.raises(ArgumentError, match=message):
        load(f"imagefolder:{folder}")


def test_a_missing_pillow_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ArgumentError, match=r"imagefolder needs Pillow: pip install 'gradprobe\[images\]'"):
        load(f"imagefolder:{tmp_path}")


def test_a_hugging_face_folder_is_read_without_the_network(pictures, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs datasets, which gradprobe[hf] installs")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = pictures({})
    rows = {"label": [2, 0, 1, 0] * 4, "img": [image.new("L", (5, 5), 10 * k) for k in range(16)]}
    features = datasets.Features({"label": datasets.ClassLabel(num_classes=3), "img": datasets.Image()})
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([3, 4])}).save_to_disk(folder / "two")
    two = load(f"hf:{folder / 'two'}")
    assert (len(two.train_y), two.test_y.tolist(), two.num_classes) == (16, [0, 2], 3)
    assert two.train_x.shape == (16, 1, 5, 5)
    levels = two.train_x[:, 0, 0, 0] * 255
    np.testing.assert_allclose(levels - levels[0], 10 * np.arange(16), atol=1e-3)
    one = load(DataSpec(f"hf:{folder / 'one'}", per_class=2))
    assert (one.name, one.train_y.tolist(), one.test_y.tolist()) == ("hf:one", [2, 0, 1, 0, 2, 1], [0, 2, 1, 0])
    whole.remove_columns("label").save_to_disk(folder / "bare")
    with pytest.raises(ArgumentError, match=r"needed columns of pictures .* found img \(Image\)"):
        load(f"hf:{folder / 'bare'}")


def test_a_missing_datasets_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ArgumentError, match=r"hf needs datasets: pip install 'gradprobe\[hf\]'"):
        load("hf:mnist")
