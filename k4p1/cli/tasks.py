"""Subcommands on finished tasks and files: `evaluate`, `compare`, `compress`, `inspect`, `configs`."""

import pathlib
from collections.abc import Sequence

from absl import flags

from k4p1 import errors, quiet_tensorflow
from k4p1.cli import gin_files, sizes
from k4p1.cli.command import command, gin_flags, model_dir_flag, offline_flag, stay_offline, task_flag


def _evaluate_flags(f: flags.FlagValues) -> None:
    model_dir_flag(f)
    task_flag(f)
    flags.DEFINE_string("split", "test", "train, validation, test or train+validation.", flag_values=f)
    flags.DEFINE_string("data", None, "Other data with the same labels.", flag_values=f)
    confusion = "Also tell which classes are taken for which, and draw confusion_SPLIT.png into the folder of each task."
    flags.DEFINE_bool("confusion", False, confusion, flag_values=f)
    offline_flag(f)


@command("Compute the metrics of finished tasks on a split.", define=_evaluate_flags)
def evaluate(f: flags.FlagValues) -> None:
    """`k4p1 evaluate`."""
    stay_offline(f)
    quiet_tensorflow.import_quietly()
    from k4p1.runs import confusion_matrix, tables
    from k4p1.runs import evaluate as evaluation

    found = evaluation.evaluate(f.model_dir, f.task, f.split, f.data, f.confusion)
    rows = []
    tables_of_mistakes = []
    for task, metrics in found.items():
        if f.confusion:
            counts, picture = metrics.pop(evaluation.CONFUSION), metrics.pop("confusion_picture")
            labels = evaluation.labels_of(f.model_dir, task)
            tables_of_mistakes.append((f"{task}: most frequent mistakes ({picture})", counts, labels))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "examples")
        rows.append((task, f"{metrics['examples']:,.0f}", shown))
    tables.print_rows(f"Split {f.split}", ("task", "examples", "metrics"), rows)
    for title, counts, labels in tables_of_mistakes:
        mistakes = [(a, b, n, f"{share:.1%}") for a, b, n, share in confusion_matrix.worst(counts, labels)]
        tables.print_rows(title, ("label", "answer", "images", "of the label's"), mistakes)


@command("Show finished runs in one table, a row per task.", arguments="MODEL_DIR ...")
def compare(f: flags.FlagValues, folders: Sequence[str]) -> None:
    """`k4p1 compare`."""
    quiet_tensorflow.import_quietly()
    from k4p1.runs import compare as comparison

    print(repr(comparison.compare(folders)))


def _compress_flags(f: flags.FlagValues) -> None:
    where = "Folder of a finished run; may be repeated for runs on the same backbone."
    flags.DEFINE_multi_string("model_dir", None, where, flag_values=f, required=True)
    flags.DEFINE_list("tasks", [], "Tasks to compress together, a,b,c; all if not given.", flag_values=f)
    rank = "Rank of the shared factors as a share of the channels, such as 0.5."
    flags.DEFINE_float("rank", None, rank, flag_values=f)
    budget = "Instead of --rank: size of all factors, such as 200KB or 1.5MB; ranks are chosen by singular-value energy."
    flags.DEFINE_string("budget", None, budget, flag_values=f)
    output = "New folder for the compressed tasks; by default 'compressed' in the first --model_dir."
    flags.DEFINE_string("output_dir", None, output, flag_values=f)
    share = "Side of the adapters that the tasks share."
    flags.DEFINE_enum("share", "output", ["output", "input"], share, flag_values=f)
    steps = "Steps per task to fine-tune its own factors; 0 for none."
    flags.DEFINE_integer("finetune_steps", 0, steps, flag_values=f, lower_bound=0)
    flags.DEFINE_float("learning_rate", 1e-3, "Learning rate of --finetune_steps.", flag_values=f)


@command("Compress the adapters of several finished tasks together.", define=_compress_flags)
def compress(f: flags.FlagValues) -> None:
    """`k4p1 compress`."""
    quiet_tensorflow.import_quietly()
    from k4p1.engine.optimizer_config import OptimizerConfig
    from k4p1.methods import compress as compression
    from k4p1.runs import tables

    output = pathlib.Path(f.output_dir or pathlib.Path(f.model_dir[0]) / "compressed").expanduser()
    budget = None if f.budget is None else sizes.parse_bytes(f.budget, "--budget")
    optimizer = OptimizerConfig(learning_rate=f.learning_rate)
    done = compression.compress(f.model_dir, output, f.tasks, f.rank, budget, f.finetune_steps, optimizer, f.share)
    columns = ["task", "accuracy before", "after", *(["fine-tuned"] if done.accuracy_finetuned else [])]
    measured = [done.accuracy_before, done.accuracy_after, *([done.accuracy_finetuned] if done.accuracy_finetuned else [])]
    rows = [(task, *(f"{accuracy[task]:.4f}" for accuracy in measured)) for task in done.accuracy_before]
    tables.print_rows("Joint compression", columns, rows)
    ranks = sorted(done.ranks.values())
    print(f"ranks of {len(ranks)} layers: {ranks[0]} to {ranks[-1]}; energy kept: {100 * done.energy:.2f}%")
    print(f"shared by the tasks: the {done.share} side of the adapters")
    share = done.bytes_after / done.bytes_before
    print(f"adapters: {done.bytes_before:,} bytes before, {done.bytes_after:,} after, shared factors included ({share:.0%})")
    print(f"compressed tasks: {done.folder}")
    if done.accuracy_finetuned:
        print(f"fine-tuned tasks: {done.folder / compression.FINETUNED}")


@command("Describe a patch, backbone, head, factor or checkpoint file, a model_dir or an export.", arguments="PATH ...")
def inspect(f: flags.FlagValues, paths: Sequence[str]) -> None:
    """`k4p1 inspect`."""
    quiet_tensorflow.import_quietly()
    from k4p1.runs import inspection

    for path in paths:
        for title, rows in inspection.inspect(path):
            print(title)
            for name, value in rows:
                print(f"  {name:<22} {value}")


def _configs_flags(f: flags.FlagValues) -> None:
    flags.DEFINE_bool("reference", False, "Print all that gin files can set, as Markdown.", flag_values=f)
    gin_flags(f, [], "With --copy_to: what to check and to copy.", "With --copy_to: bindings, checked with the files.")
    flags.DEFINE_string("copy_to", None, "Copy gin files, with all that they include, into this folder.", flag_values=f)


@command("List the shipped gin files, or all that gin files can set; copy gin files for a job.", define=_configs_flags)
def configs(f: flags.FlagValues) -> None:
    """`k4p1 configs`."""
    if f.reference:
        quiet_tensorflow.import_quietly()
        from k4p1.cli import gin_config

        print(gin_config.reference(), end="")
        return
    if f.copy_to is not None:
        _copy(f)
        return
    for name, summary in gin_files.shipped().items():
        print(f"{name:<24} {summary}")


def _copy(f: flags.FlagValues) -> None:
    """Checks gin files and bindings, and copies the files; prints their names in the folder."""
    quiet_tensorflow.import_quietly()
    from k4p1.cli import gin_bundle, gin_config
    from k4p1.files import atomic

    if not f.gin_file:
        raise errors.ConfigError("k4p1 configs --copy_to needs --gin_file")
    gin_config.load(f.gin_file, f.gin_bindings)
    names, texts = gin_bundle.carried(f.gin_file)
    for name, text in texts.items():
        atomic.write_text(pathlib.Path(f.copy_to).expanduser() / name, text)
    print("\n".join(names))
