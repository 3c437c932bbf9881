"""Describes a file or folder of k4p1: what it is, parameters, bytes, fingerprint."""

import json
import pathlib
from collections.abc import Sequence

from k4p1 import errors
from k4p1.engine import checkpoints
from k4p1.files import run_record, schema, tensor_file
from k4p1.patches.bit_packing import BitPacking
from k4p1.runs.model_dir import ModelDir

Rows = Sequence[tuple[str, object]]


def inspect(path: str | pathlib.Path) -> list[tuple[str, Rows]]:
    """(title, rows of name and value) for a patch file, backbone file, head file, checkpoint, model directory or export.

    Raises:
      ArtifactError: missing, damaged, or none of these.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise errors.ArtifactError(f"no file or folder {path}")
    if path.is_file():
        return [_file(path)]
    if (path / "run.json").is_file() or (path / "result.json").is_file():
        return _model_dir(ModelDir(path))
    exports = sorted(path.rglob("saved_model.pb"))
    if exports:
        return [_export(export.parent) for export in exports]
    raise errors.ArtifactError(f"{path} is neither a model_dir nor an export of k4p1")


def _file(path: pathlib.Path) -> tuple[str, Rows]:
    from k4p1.backbones import files as backbone_files
    from k4p1.patches import factor_file, patch_file

    formats = {
        patch_file.FORMAT: patch_file.VERSION,
        patch_file.HEAD_FORMAT: patch_file.VERSION,
        backbone_files.FORMAT: backbone_files.VERSION,
        factor_file.FORMAT: factor_file.VERSION,
        checkpoints.FORMAT: checkpoints.VERSION,
    }
    format_name = tensor_file.read_header(path).get("format", "")
    if format_name not in formats:
        raise errors.ArtifactError(f"{path} is no file of k4p1")
    tensors, metadata = tensor_file.read(path, format_name, formats[format_name])
    values = sum(tensor.size for tensor in tensors.values())
    rows: list[tuple[str, object]] = [("bytes", f"{path.stat().st_size:,}"), ("values", f"{values:,}")]
    if format_name == patch_file.FORMAT:
        info = patch_file.read_patch(path)[1]
        statistics = sum(t.size for name, t in tensors.items() if "/moving_" in name)
        bits = {name: t.size for name, t in tensors.items() if name.endswith(f"/{BitPacking.name}")}
        shown = info.labels if len(info.labels) <= 8 else (*info.labels[:8], "...")
        rows += [
            ("task", info.task),
            ("spec", info.spec),
            ("private parameters", _parameters(values - statistics, sum(bits.values()))),
            ("private statistics", f"{statistics:,}"),
            ("policy", _policy(info.spec.options())),
            ("labels", f"{len(info.labels)}: {', '.join(shown)}"),
            ("image size", "x".join(map(str, info.image_size))),
            ("input scaling", info.scaling),
            ("backbone", info.backbone),
            ("backbone fingerprint", info.fingerprint),
            ("shared head", info.shared_head or "none"),
            ("shared factors", info.factors or "none"),
            ("written by", f"k4p1 {info.k4p1_version}"),
        ]
    elif format_name == backbone_files.FORMAT:
        metadata = backbone_files.read(path)[1]
        rows += [(name, metadata[name]) for name in ("name", "scaling", "fingerprint")]
        rows.append(("batch normalisation", metadata["normalisation"] or "trained with the rest"))
        config = metadata["config"]
        rows.append(("config", config if len(config) < 200 else config[:200] + "..."))
    elif format_name == factor_file.FORMAT:
        rows.append(("backbone fingerprint", factor_file.read_factors(path)[1]))
    elif format_name == checkpoints.FORMAT:
        rows += [(name, int(tensor)) for name, tensor in tensors.items() if name.startswith("ticket/") and tensor.size == 1]
        rows.append(("progress", metadata.get("progress", "none")))
    else:
        rows.append(("labels", ", ".join(patch_file.read_head(path)[1])))
    rows.append(("content hash", tensor_file.read_header(path)["content_hash"]))
    return f"{format_name} {path}", rows


def _parameters(stored: int, mask_bytes: int) -> str:
    """The number of private values, and that of mask bits where there are."""
    return f"{stored - mask_bytes:,}" + (f", and {8 * mask_bytes:,} bits of masks" if mask_bytes else "")


def _policy(options: dict[str, dict[str, object]]) -> str:
    """Every option of every kind, defaults included."""
    return (
        "; ".join(f"{kind}: {', '.join(f'{k}={v}' for k, v in given.items())}" for kind, given in options.items()) or "none"
    )


def _model_dir(folder: ModelDir) -> list[tuple[str, Rows]]:
    rows: list[tuple[str, object]] = []
    if (folder.root / "run.json").is_file():
        run = run_record.read(folder.root)
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        rows += [("config hash", run["config_hash"]), ("versions", versions)]
    kept = checkpoints.Checkpoints(folder.checkpoints).paths()
    rows.append(("checkpoints", ", ".join(path.name for path in kept) or "none"))
    rows.append(("finished", "yes" if folder.result.is_file() else "no"))
    result = folder.read_result()
    if result["model_size_ratio"] is not None:
        ratio = f"{result['model_size_ratio']:.3f} (backbone, factors and patches over backbone; heads left out)"
        rows.append(("model-size ratio", ratio))
    sections = [(f"model_dir {folder.root}", rows)]
    files = [folder.backbone, *sorted(folder.factors.glob("*.safetensors"))]
    sections += [_file(path) for path in files if path.is_file()]
    for path in sorted(folder.root.glob("tasks/*/patch.safetensors")):
        title, listed = _file(path)
        sections.append((title, [*listed, *_costs(result["tasks"].get(path.parent.name, {}))]))
    return sections


def _costs(entry: dict[str, object]) -> Rows:
    """What a task costs, as its run counted it."""
    names = {
        "private_trained": "private trained",
        "multiply_adds": "multiply-adds, unpatched",
        "multiply_adds_added": "added before folding",
        "multiply_adds_added_folded": "added after folding",
        "blocks": "blocks",
        "live_blocks": "live blocks",
        "live_proxies": "live proxies",
        "backbone_parameters": "backbone parameters",
        "live_parameters": "live parameters",
        "backbone_multiply_adds": "backbone multiply-adds",
        "live_multiply_adds": "live multiply-adds",
    }
    return [(shown, f"{entry[name]:,}") for name, shown in names.items() if schema.NUMBER.holds(entry.get(name))]


def _export(path: pathlib.Path) -> tuple[str, Rows]:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    rows: list[tuple[str, object]] = [
        ("bytes", f"{sum(p.stat().st_size for p in path.rglob('*') if p.is_file()):,}"),
    ]
    for name, signature in loaded.signatures.items():
        inputs = ", ".join(f"{k}: {v.dtype.name} {v.shape}" for k, v in signature.structured_input_signature[1].items())
        outputs = ", ".join(f"{k}: {v.dtype.name} {v.shape}" for k, v in signature.structured_outputs.items())
        rows.append((f"signature {name}", f"{inputs} -> {outputs}"))
    about = path / "assets.extra" / "k4p1.json"
    if about.is_file():
        said = json.loads(about.read_text(encoding="utf-8"))
        if "normalisations_folded" in said:
            counts = f"{said['normalisations_folded']} folded, {said['normalisations_kept']} kept"
            rows.append(("batch normalisations", counts))
        for task, labels in said.get("tasks", {}).items():
            rows.append((f"labels of {task}", ", ".join(labels[:12])))
    labels = path / "assets" / "labels.txt"
    if labels.is_file():
        rows.append(("labels", ", ".join(labels.read_text(encoding="utf-8").split("\n")[:-1][:12])))
    return f"SavedModel {path}", rows
