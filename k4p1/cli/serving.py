"""Subcommands that answer or prepare answers: `predict`, `export`."""

from collections.abc import Sequence

from absl import flags

from k4p1 import quiet_tensorflow
from k4p1.cli.command import command, model_dir_flag, task_flag


def _predict_flags(f: flags.FlagValues) -> None:
    model_dir_flag(f)
    task_flag(f)
    flags.DEFINE_integer("top", 3, "Number of labels to show per image.", flag_values=f, lower_bound=1)


@command("Show the most probable labels of images.", arguments="IMAGE ...", define=_predict_flags)
def predict(f: flags.FlagValues, images: Sequence[str]) -> None:
    """`k4p1 predict`."""
    quiet_tensorflow.import_quietly()
    from k4p1.runs import tables
    from k4p1.serving import predict as prediction

    found = prediction.predict(f.model_dir, f.task, images, f.top)
    rows = [(path, ", ".join(f"{label} {probability:.3f}" for label, probability in best)) for path, best in found]
    tables.print_rows("Predictions", ("image", "label and probability"), rows)


def _export_flags(f: flags.FlagValues) -> None:
    model_dir_flag(f)
    task_flag(f)
    flags.DEFINE_string("export_dir", None, "Where <task>/<version>/ is written.", flag_values=f, required=True)


@command("Write one SavedModel per task.", define=_export_flags)
def export(f: flags.FlagValues) -> None:
    """`k4p1 export`."""
    quiet_tensorflow.import_quietly()
    from k4p1.serving import export as exporting

    for task, (path, difference) in exporting.export(f.model_dir, f.export_dir, f.task).items():
        print(f"task '{task}': {path}; largest difference of the outputs on a probe batch: {difference:.2g}")
