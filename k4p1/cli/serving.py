"""Subcommands that answer or prepare answers: `predict`, `export`."""

from collections.abc import Sequence

from absl import flags

from k4p1 import errors, quiet_tensorflow
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
    several = "Folder of a finished run; with --together, several may be given."
    flags.DEFINE_multi_string("model_dir", None, several, flag_values=f, required=True)
    task_flag(f)
    together = "One SavedModel of all tasks: the backbone once, one signature per task, and one for batches of mixed tasks."
    flags.DEFINE_bool("together", False, together, flag_values=f)
    where = "Where <task>/<version>/ is written; with --together, <version>/."
    flags.DEFINE_string("export_dir", None, where, flag_values=f, required=True)


@command("Write one SavedModel per task, or one for all tasks.", define=_export_flags)
def export(f: flags.FlagValues) -> None:
    """`k4p1 export`."""
    quiet_tensorflow.import_quietly()
    from k4p1.serving import export as exporting

    if f.together:
        if f.task is not None:
            raise errors.ConfigError(f"--task={f.task} and --together exclude each other: together are all tasks")
        path, difference = exporting.export_all_together(f.model_dir, f.export_dir)
        print(f"all tasks: {path}; largest difference of the logits on a probe batch: {difference:.2g}")
        return
    if len(f.model_dir) > 1:
        raise errors.ConfigError(f"--model_dir is given {len(f.model_dir)} times; more than once needs --together")
    for task, (path, difference) in exporting.export(f.model_dir[0], f.export_dir, f.task).items():
        print(f"task '{task}': {path}; largest difference of the outputs on a probe batch: {difference:.2g}")
