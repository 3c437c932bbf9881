"""Folders of images: layouts, formats, and what is refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from k4p1 import errors
from k4p1.data import ImageFolder, Pipeline, Splits, open_source

ENCODERS = {".jpg": tf.io.encode_jpeg, ".jpeg": tf.io.encode_jpeg, ".png": tf.io.encode_png}


def write_image(path, value=100, size=(8, 10), channels=3):
    """A flat image of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, channels), value, np.uint8)
    path.write_bytes(ENCODERS[path.suffix.lower()](pixels).numpy())


def write_classes(root, classes, images=3):
    for number, name in enumerate(classes):
        for i in range(images):
            write_image(root / name / f"{i}.jpg", value=40 * (number + 1))


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images."""
    write_classes(tmp_path, ("cat", "dog"))
    return tmp_path


def all_examples(source, split="train", size=(8, 10)):
    pipeline = Pipeline(source, Splits(source, validation_fraction=0), size, 64, len(source.labels))
    (batch,) = pipeline.sequential(split)
    return {key: value.numpy() for key, value in batch.items()}


def test_class_folders_are_labels_in_alphabetical_order(folder):
    write_image(folder / "ant" / "x.png", value=200)
    source = ImageFolder(folder)
    assert source.labels == ("ant", "cat", "dog")
    assert source.sizes() == {"train": 7}
    assert [int(e["label"]) for e in source.examples("train")] == [0, 1, 1, 1, 2, 2, 2]


def test_images_come_in_the_order_of_their_paths(folder):
    for name, value in (("z.png", 9), ("a.png", 3), ("below/b.png", 5)):
        write_image(folder / "ant" / name, value)
    encoded = [e["image"].numpy() for e in ImageFolder(folder).examples("train")][:3]
    assert encoded == [(folder / "ant" / name).read_bytes() for name in ("a.png", "below/b.png", "z.png")]


def test_split_folders(tmp_path):
    for split, images in (("train", 6), ("validation", 2), ("test", 1)):
        write_classes(tmp_path / split, ("cat", "dog"), images)
    source = ImageFolder(tmp_path)
    assert source.sizes() == {"train": 12, "validation": 4, "test": 2}
    assert source.labels == ("cat", "dog")
    splits = Splits(source)
    assert {split: splits.size(split) for split in ("train", "validation", "test", "train+validation")} == {
        "train": 12,
        "validation": 4,
        "test": 2,
        "train+validation": 16,
    }


def test_a_class_that_only_the_test_split_has_counts(tmp_path):
    write_classes(tmp_path / "train", ("cat", "dog"))
    write_classes(tmp_path / "test", ("cat", "elk"))
    source = ImageFolder(tmp_path)
    assert source.labels == ("cat", "dog", "elk")
    assert [int(e["label"]) for e in source.examples("test")] == [0, 0, 0, 2, 2, 2]


def test_a_class_named_test_without_a_train_folder_is_a_class(tmp_path):
    write_classes(tmp_path, ("test", "try"))
    assert ImageFolder(tmp_path).labels == ("test", "try")


def test_grey_and_png_images_become_rgb(tmp_path):
    write_image(tmp_path / "train" / "bird" / "grey.png", value=77, channels=1)
    write_image(tmp_path / "train" / "bird" / "grey.jpg", value=77, channels=1)
    write_image(tmp_path / "train" / "bird" / "alpha.png", value=77, channels=4)
    write_image(tmp_path / "train" / "cat" / "UPPER.JPEG", value=77)
    write_classes(tmp_path / "test", ("bird", "cat"))
    batch = all_examples(ImageFolder(tmp_path), "train")
    assert batch["inputs"].shape == (4, 8, 10, 3)
    assert batch["weight"].all()
    assert np.abs(batch["inputs"].astype(int) - 77).max() <= 1  # JPEG rounds


def test_other_files_and_hidden_folders_are_ignored(folder):
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "README.md").write_text("no class")
    write_image(folder / ".cache" / "thumb.jpg")
    (folder / "empty_class").mkdir()
    source = ImageFolder(folder)
    assert source.labels == ("cat", "dog")
    assert source.sizes() == {"train": 6}


def test_corrupt_files_are_named_and_counted(folder):
    whole = (folder / "dog" / "1.jpg").read_bytes()
    (folder / "dog" / "1.jpg").write_bytes(whole[: len(whole) // 3])
    (folder / "cat" / "2.jpg").write_bytes(b"")
    source = ImageFolder(folder)
    bad = [str(folder / "cat" / "2.jpg"), str(folder / "dog" / "1.jpg")]
    assert source.corrupt("train") == bad
    pipeline = Pipeline(source, Splits(source, validation_fraction=0), (8, 10), 2, 2)
    assert pipeline.corrupt_files("train", limit=5) == bad
    assert pipeline.corrupt_files("train", limit=1) == bad[:1]
    assert sum(int((batch["weight"].numpy() == 0).sum()) for s in ("train", "test") for batch in pipeline.sequential(s)) == 2


def test_the_name_of_a_folder_opens_it(folder):
    source = open_source(str(folder))
    assert isinstance(source, ImageFolder)
    assert source.labels == ("cat", "dog")


class TestRefusals:
    def test_missing(self, tmp_path):
        with pytest.raises(errors.DataError, match=r"no image folder .*nowhere"):
            ImageFolder(tmp_path / "nowhere")
        with pytest.raises(errors.DataError, match=r"no folder .*nowhere; give"):
            open_source(str(tmp_path / "nowhere"))

    def test_empty(self, tmp_path):
        (tmp_path / "cat").mkdir()
        with pytest.raises(errors.DataError, match=r"has no images; expected .*<class>/<image> with .jpg"):
            ImageFolder(tmp_path)

    def test_one_class(self, tmp_path):
        write_classes(tmp_path, ("cat",))
        with pytest.raises(errors.DataError, match="has one class, 'cat'; a classifier needs two or more"):
            ImageFolder(tmp_path)

    def test_images_without_class_folders(self, tmp_path):
        write_image(tmp_path / "1.jpg")
        with pytest.raises(errors.DataError, match="has no images; expected"):
            ImageFolder(tmp_path)

    def test_an_empty_training_split(self, tmp_path):
        (tmp_path / "train" / "cat").mkdir(parents=True)
        write_classes(tmp_path / "test", ("cat", "dog"))
        with pytest.raises(errors.DataError, match="has no training examples"):
            Splits(ImageFolder(tmp_path))


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_a_validation_folder_by_any_of_its_names(tmp_path, folder):
    for split, count in (("train", 6), (folder, 2)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                keras.utils.save_img(tmp_path / split / label / f"{number}.png", np.zeros((4, 4, 3)))
    source = ImageFolder(tmp_path)
    assert source.sizes() == {"train": 12, "validation": 4} and source.labels == ("cat", "dog")


@pytest.mark.parametrize("with_test", [False, True])
@pytest.mark.parametrize("folder", ["val", "validation"])
def test_the_validation_split_is_that_of_its_folder(tmp_path, folder, with_test):
    """With and without a test folder, no image of train is held out for validation."""
    write_classes(tmp_path / "train", ("cat", "dog"), 10)
    for label in ("cat", "dog"):
        write_image(tmp_path / folder / label / "x.png", value=255)
    if with_test:
        write_classes(tmp_path / "test", ("cat", "dog"), 2)
    source = ImageFolder(tmp_path)
    splits = Splits(source)
    assert splits.size("validation") == 2 and splits.size("train") == (20 if with_test else 16)
    (batch,) = Pipeline(source, splits, (8, 10), 64, 2).sequential("validation")
    assert (batch["inputs"].numpy() == 255).all()


class TestAClassNamedTrain:
    def test_that_holds_images_is_a_class_beside_others(self, tmp_path):
        write_classes(tmp_path, ("car", "train", "val"))
        source = ImageFolder(tmp_path)
        assert source.labels == ("car", "train", "val") and source.sizes() == {"train": 9}

    def test_that_holds_folders_could_be_either(self, tmp_path):
        write_classes(tmp_path, ("car",))
        write_classes(tmp_path / "train", ("steam", "electric"))
        with pytest.raises(
            errors.DataError, match=r"has train/, .*beside it car/, which is no split; if 'train' is a class"
        ):
            ImageFolder(tmp_path)

    def test_folders_without_images_beside_a_split_do_not_matter(self, tmp_path):
        write_classes(tmp_path / "train", ("cat", "dog"))
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "list.txt").write_text("text")
        assert ImageFolder(tmp_path).labels == ("cat", "dog")

    def test_images_of_a_split_without_classes(self, tmp_path):
        write_image(tmp_path / "train" / "1.jpg")
        write_image(tmp_path / "test" / "1.jpg")
        with pytest.raises(
            errors.DataError, match=r"has images in train/ without folders of classes; expected .*/train/<class>"
        ):
            ImageFolder(tmp_path)

    def test_upper_case_names_are_splits(self, tmp_path):
        for split in ("Train", "Val"):
            write_classes(tmp_path / split, ("cat", "dog"))
        assert ImageFolder(tmp_path).sizes() == {"train": 6, "validation": 6}

    def test_two_folders_for_one_split(self, tmp_path):
        for split in ("train", "val", "valid"):
            write_classes(tmp_path / split, ("cat", "dog"))
        with pytest.raises(errors.DataError, match="has val/ and valid/, both for its validation split; keep one"):
            ImageFolder(tmp_path)


def test_orientation_and_palettes_reach_the_batches(tmp_path):
    """A wide image that is meant to be shown upright, and a bitmap whose first colour is not black."""
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (8, 1))).convert("RGB")
    painted = Image.new("RGB", (8, 32), (200, 30, 90)).convert("P", palette=Image.ADAPTIVE)
    for label, image, name, options in (("wide", wide, "a.jpg", {"exif": exif}), ("red", painted, "a.bmp", {})):
        (tmp_path / "train" / label).mkdir(parents=True)
        image.save(tmp_path / "train" / label / name, **options)
    write_classes(tmp_path / "test", ("wide", "red"))
    source = ImageFolder(tmp_path)
    red, tall = all_examples(source, "train", size=(32, 8))["inputs"]
    assert source.corrupt("train") == []
    assert (red == (200, 30, 90)).all()
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "train" / "wide" / "a.jpg"))
    assert np.abs(tall.astype(int) - np.asarray(upright)).max() <= 2
