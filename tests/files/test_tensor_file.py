"""Files are whole or not there."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from k4p1 import errors
from k4p1.files import atomic, tensor_file


def failing(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_appears_when_all_is_written(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic.written_atomically(path) as beside:
        beside.write_text("half")
        assert not path.exists()
        assert beside.parent == path.parent
    assert path.read_text() == "half"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_failing_write_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "file.txt"
    atomic.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic.written_atomically(path) as beside:
        beside.write_text("new, but")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no write permission"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("when", ["write", "fsync", "rename"])
def test_an_error_of_the_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, when, code, reason):
    path = tmp_path / "file.txt"
    atomic.write_text(path, "old")
    target, name = {"write": (pathlib.Path, "write_text"), "fsync": (os, "fsync"), "rename": (os, "replace")}[when]
    monkeypatch.setattr(target, name, failing(code))
    with pytest.raises(errors.StorageError) as caught:
        atomic.write_text(path, "new")
    monkeypatch.undo()
    assert str(caught.value) == f"cannot write {path}: {reason}"
    assert caught.value.exit_code == 2
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_full_disk_leaves_the_old_safetensors_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    tensor_file.write(path, "kind", 1, {"a": np.ones(3)}, {})
    monkeypatch.setattr(pathlib.Path, "write_bytes", failing(errno.ENOSPC))
    with pytest.raises(errors.StorageError, match="no space left on the disk"):
        tensor_file.write(path, "kind", 1, {"a": np.zeros(3)}, {})
    tensors, _ = tensor_file.read(path, "kind", 1)
    np.testing.assert_array_equal(tensors["a"], np.ones(3))
    assert os.listdir(tmp_path) == ["file.safetensors"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(errors.StorageError, match="no write permission"):
            atomic.write_text(tmp_path / "file.txt", "text")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for inside in ("inside.txt", "deeper/inside.txt"):
        with pytest.raises(errors.StorageError, match=r"cannot write .*: a part of the path is a file, not a folder"):
            atomic.write_text(tmp_path / "file" / inside, "text")


def test_a_path_that_is_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.StorageError, match=r"cannot write .*folder: Is a directory"):
        atomic.write_text(tmp_path / "folder", "text")
    assert os.listdir(tmp_path) == ["folder"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "file.txt", "text")
    finally:
        assert os.umask(before) == 0o027
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o640


def test_writing_does_not_touch_the_umask_of_other_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the whole process"))
    atomic.write_text(tmp_path / "file.txt", "text")
    assert (tmp_path / "file.txt").read_text() == "text"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a/b", np.zeros(2, "int64"), "is int64; expected float32"),
        ("a/b", np.zeros(2, "bool"), "is bool; expected float32"),
        ("a/b", np.array([0, np.nan], "float32"), "holds values that are not finite"),
        ("a/b", np.array([0, -np.inf], "float32"), "holds values that are not finite"),
        ("a/moving_variance", np.array([1, -1e-6], "float32"), "holds a negative variance"),
        ("a/bits", np.zeros(2, "float32"), "is float32; expected uint8 bits"),
    ],
)
def test_values_that_no_parameter_has(name, value, message):
    with pytest.raises(errors.ArtifactError, match=f"somewhere: tensor '{name}' {message}"):
        tensor_file.check_values("somewhere", {name: value}, bits="bits")


def test_values_that_parameters_have():
    tensors = {"a/moving_variance": np.zeros(2, "float32"), "a/beta": -np.ones(2, "float16"), "a/bits": np.zeros(2, "uint8")}
    tensor_file.check_values("somewhere", tensors, bits="bits")


def test_values_that_could_not_be_read_are_not_written():
    with pytest.raises(errors.DivergedError, match="task 't': 'a/b' holds values that are not finite; not written"):
        tensor_file.check_before_writing("task 't'", {"a/b": np.array([np.nan], "float32")})


def test_text_and_json(tmp_path):
    atomic.write_text(tmp_path / "a.txt", "žluť\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "žluť\n"
    atomic.write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None]}


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {
        "a/b": np.arange(12, dtype="float32").reshape(3, 4).T,  # not contiguous
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 3), "int64"),
        "bytes": np.arange(5, dtype="uint8"),
    }
    tensor_file.write(tmp_path / "f", "kind", 3, tensors, {"note": "ž\n\"'"})
    read, metadata = tensor_file.read(tmp_path / "f", "kind", 3)
    assert metadata == {"note": "ž\n\"'", "format": "kind", "version": "3"}
    assert tensor_file.read_header(tmp_path / "f").keys() == {"note", "format", "version", "content_hash"}
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


def test_a_file_without_tensors(tmp_path):
    tensor_file.write(tmp_path / "f", "kind", 1, {}, {"note": "empty"})
    assert tensor_file.read(tmp_path / "f", "kind", 1)[0] == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or no safetensors file"),
        (b"\xff" * 64, "is damaged or no safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}", r"is no kind file \(format: unknown\)"),
    ],
)
def test_files_that_are_none_of_ours(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(errors.ArtifactError, match=message) as caught:
        tensor_file.read(tmp_path / "f", "kind", 1)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(errors.ArtifactError, match="is a folder; expected a file"):
        tensor_file.read(tmp_path, "kind", 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path):
    tensor_file.write(tmp_path / "f", "kind", 1, {}, {})
    (tmp_path / "f").chmod(0)
    with pytest.raises(errors.ArtifactError, match="no permission"):
        tensor_file.read(tmp_path / "f", "kind", 1)
