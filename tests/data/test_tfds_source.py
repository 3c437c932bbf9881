"""TensorFlow Datasets: prepared directories and names."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from k4p1 import errors
from k4p1.cli import main
from k4p1.data import Pipeline, Splits, Tfds, open_source

LABELS = ("circle", "square", "star")


def prepare(root, features, examples, **further):
    """Writes a prepared TFDS directory with a train and a test split, and further ones, and returns its path."""

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            splits = {"train": examples, "test": examples[:3], **further}
            return {name: self._generate_examples(listed) for name, listed in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    Made.__module__ = "made"  # TFDS looks for checksums beside the package of a builder
    builder = Made(data_dir=str(root))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(register_checksums=False))
    return builder.data_dir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Twelve PNG images of three classes; image i has the value 10 i everywhere."""
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "picture": tfds.features.Image(shape=(6, 6, 3), encoding_format="png"),
            "shape": tfds.features.ClassLabel(names=LABELS),
        }
    )
    examples = [{"id": str(i), "picture": np.full((6, 6, 3), 10 * i, np.uint8), "shape": LABELS[i % 3]} for i in range(12)]
    return prepare(tmp_path_factory.mktemp("tfds"), features, examples)


def values_and_labels(source, split):
    pipeline = Pipeline(source, Splits(source, validation_fraction=0), (6, 6), 64, len(source.labels))
    (batch,) = pipeline.sequential(split)
    return [(int(x[0, 0, 0]), int(label)) for x, label in zip(batch["inputs"], batch["label"], strict=True)]


def test_a_prepared_directory_has_labels_and_sizes(prepared):
    source = Tfds(prepared)
    assert source.labels == LABELS
    assert source.sizes() == {"train": 12, "test": 3}


def test_image_and_label_are_found_by_type_and_belong_together(prepared):
    found = values_and_labels(Tfds(prepared), "train")
    assert sorted(found) == [(10 * i, i % 3) for i in range(12)]


def test_validation_stands_for_a_test_split_whose_labels_are_hidden(tmp_path):
    """As in `visual_domain_decathlon`, whose test labels are -1."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(6, 6, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
    )
    examples = [{"image": np.full((6, 6, 3), 10 * i, np.uint8), "label": i % 3} for i in range(12)]
    hidden = [{"image": np.zeros((6, 6, 3), np.uint8), "label": -1}] * 5
    source = Tfds(prepare(tmp_path, features, examples, test=hidden, validation=examples[:4]))
    assert source.sizes() == {"train": 12, "test": 4}
    assert sorted(values_and_labels(source, "test")) == [(0, 0), (10, 1), (20, 2), (30, 0)]
    assert not Splits(source, validation_fraction=0).has("validation")
    assert Splits(source, validation_fraction=0.25).size("validation") == 3


def test_the_order_never_changes(prepared):
    orders = [values_and_labels(Tfds(prepared), "train") for _ in range(2)]
    assert orders[0] == orders[1]


def test_images_come_encoded(prepared):
    example = next(iter(Tfds(prepared).examples("train")))
    assert example["image"].dtype == tf.string
    assert tf.io.decode_image(example["image"]).shape == (6, 6, 3)


def test_the_path_of_a_prepared_directory_opens_it(prepared):
    assert isinstance(open_source(prepared), Tfds)


def test_no_python_runs_in_the_pipeline(prepared):
    source = Tfds(prepared)
    data = Pipeline(source, Splits(source), (6, 6), 4, 3, augment="crop+flip").training()
    graph = tf.raw_ops.DatasetToGraphV2(input_dataset=data._variant_tensor, external_state_policy=1)
    definition = tf.compat.v1.GraphDef.FromString(graph.numpy())
    names = {node.op for function in definition.library.function for node in function.node_def}
    names |= {node.op for node in definition.node}
    assert "DecodeImage" in names
    assert not {name for name in names if "PyFunc" in name}


def test_real_images(real_data):
    source = open_source(str(real_data / "dtd10" / "1.0.0"))
    assert (len(source.labels), source.sizes()) == (10, {"train": 952, "test": 239})
    batch = next(iter(Pipeline(source, Splits(source), (32, 32), 8, 10).training()))
    assert batch["weight"].numpy().tolist() == [1.0] * 8
    assert 10 < float(tf.math.reduce_std(tf.cast(batch["inputs"], tf.float32))) < 120


def test_an_unknown_name_shows_the_nearest():
    with pytest.raises(errors.DataError, match=r"no data set 'cifar11'.*nearest TFDS names: .*cifar10"):
        Tfds("cifar11")


def test_a_name_that_is_near_nothing():
    with pytest.raises(errors.DataError, match=r"neither embedded, nor a folder, nor known to TFDS$"):
        Tfds("qqqqqqqqqqqq")


def test_what_is_not_prepared_is_not_downloaded_unasked(tmp_path):
    with pytest.raises(
        errors.DataError, match=r"'mnist' is not prepared .*, and downloads are not allowed; run tfds.builder"
    ):
        Tfds("mnist", data_dir=str(tmp_path), download=False)


def test_offline_runs_say_what_to_prepare(tmp_path, monkeypatch, capsys):
    """The flag reaches TFDS, and nothing is written."""
    monkeypatch.setenv("K4P1_OFFLINE", "")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("downloads"))
    bindings = ["Task.data_dir = '" + str(tmp_path / "sets") + "'", "digits/Task.data = 'cifar10'"]
    flags = [part for binding in bindings for part in ("--gin_bindings", binding)]
    assert main.main(["train", "--offline", "--model_dir", str(tmp_path / "m"), *flags]) == 2
    said = capsys.readouterr().err
    assert "TFDS data set 'cifar10' is not prepared" in said and "tfds.builder('cifar10', data_dir=FOLDER)" in said
    assert not (tmp_path / "m").exists()


def test_a_damaged_directory(prepared, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{ not json")
    with pytest.raises(errors.DataError, match=f"TFDS cannot open '{tmp_path}'"):
        Tfds(str(tmp_path))


def test_a_data_set_without_labels(tmp_path):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(4, 4, 3))})
    directory = prepare(tmp_path, features, [{"image": np.zeros((4, 4, 3), np.uint8)}] * 3)
    source = Tfds(directory)
    assert source.fields == () and source.labels == ()
    with pytest.raises(errors.DataError, match=r"has no field 'label', .* it has: image"):
        Pipeline(source, Splits(source, validation_fraction=0), (4, 4), 2, 2)


def test_other_features_are_fields(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "species": tfds.features.ClassLabel(names=["cat", "dog"]),
            "mask": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
        }
    )
    example = {"image": np.zeros((4, 4, 3), np.uint8), "species": 1, "mask": np.full((4, 4, 1), 7, np.uint8)}
    source = Tfds(prepare(tmp_path, features, [example] * 3))
    assert set(source.fields) == {"label", "mask"} and source.labels == ("cat", "dog")
    read = next(iter(source.examples("train")))
    assert int(read["label"]) == 1 and int(read["mask"][0, 0, 0]) == 7
