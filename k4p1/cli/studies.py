"""Subcommands that compare and draw: `method_table`, `mask_rates`, `sparsity`, `draw`."""

from collections.abc import Callable

from absl import flags

from k4p1 import errors, quiet_tensorflow
from k4p1.cli.command import command, model_dir_flag, task_flag


def _cifar_resnet_flags(f: flags.FlagValues, required: bool) -> None:
    weights = "Arrays of a CIFAR ResNet (.npz), or a backbone file of k4p1."
    flags.DEFINE_string("weights", None, weights, flag_values=f, required=required)
    flags.DEFINE_integer("depth", 56, "Depth of the CIFAR ResNet.", flag_values=f, lower_bound=8)


def _method_table_flags(f: flags.FlagValues) -> None:
    file = "File of results, one JSON object per line; runs already in it are skipped."
    flags.DEFINE_string("results_file", None, file, flag_values=f, required=True)
    flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS directories, <task>/1.0.0.", flag_values=f)
    _cifar_resnet_flags(f, required=False)
    flags.DEFINE_list("tasks", [], "Tasks to measure, a,b,c; all if not given.", flag_values=f)
    methods = "A method to measure, such as lora or 'mask, BN frozen'; may be repeated. The usual nine if not given."
    flags.DEFINE_multi_string("methods", [], methods, flag_values=f)
    flags.DEFINE_list("seeds", ["0"], "Seeds, one run each, such as 1,2,3.", flag_values=f)
    rates = "Learning rates, one run each, such as 0.003,0.01; default: each method's own."
    flags.DEFINE_list("rates", [], rates, flag_values=f)
    mask_rate = "Learning rate of mask scores; that of the methods if not given."
    flags.DEFINE_float("mask_rate", None, mask_rate, flag_values=f)
    flags.DEFINE_float("steps_scale", 1.0, "Multiplies the steps of every task.", flag_values=f)
    flags.DEFINE_bool("table", False, "Only print the table of --results_file.", flag_values=f)


@command("Compare accuracy and size of patch kinds on one backbone.", define=_method_table_flags)
def method_table(f: flags.FlagValues) -> None:
    """`k4p1 method_table`."""
    for flag in ("data_dir", "weights"):
        if not f.table and getattr(f, flag) is None:
            raise errors.ConfigError(f"k4p1 method_table needs --{flag}, or --table to print what {f.results_file} holds")
    seeds, rates = _numbers(f, "seeds", int), _numbers(f, "rates", float)
    quiet_tensorflow.import_quietly()
    from k4p1.backbones import cifar_resnet
    from k4p1.studies import method_table as study

    if f.table:
        results = study.read_results(f.results_file)
        if not results:
            raise errors.ArtifactError(f"no results in {f.results_file}; measure some without --table")
    else:
        results = study.method_table(
            backbone=lambda: cifar_resnet(f.weights, f.depth),
            data_dir=f.data_dir,
            results_file=f.results_file,
            tasks=f.tasks or tuple(study.STEPS),
            methods=f.methods or study.DEFAULT_METHODS,
            seeds=seeds,
            rates=rates,
            mask_rate=f.mask_rate,
            steps_scale=f.steps_scale,
        )
    print(*study.markdown(results), sep="\n")


def _mask_rates_flags(f: flags.FlagValues) -> None:
    flags.DEFINE_string("data", None, "Prepared TFDS directory, or other data of a task.", flag_values=f, required=True)
    _cifar_resnet_flags(f, required=True)
    flags.DEFINE_list("rates", ["1e-4", "3e-4"], "Learning rates of the scores.", flag_values=f)
    flags.DEFINE_integer("steps", 150, "Steps per rate.", flag_values=f, lower_bound=1)


@command("Show what masks do to a network with frozen batch normalisation.", define=_mask_rates_flags)
def mask_rates(f: flags.FlagValues) -> None:
    """`k4p1 mask_rates`."""
    rates = _numbers(f, "rates", float)
    quiet_tensorflow.import_quietly()
    from k4p1.backbones import cifar_resnet
    from k4p1.studies import mask_rates as study

    found = study.mask_rates(backbone=lambda: cifar_resnet(f.weights, f.depth), data=f.data, rates=rates, steps=f.steps)
    print(*study.markdown(found), sep="\n")


def _sparsity_flags(f: flags.FlagValues) -> None:
    model_dir_flag(f)
    task_flag(f)
    flags.DEFINE_string("plot", None, "Picture to write: a .png, .svg or .pdf file.", flag_values=f)


@command("Show how many weights of each layer the masks remove.", define=_sparsity_flags)
def sparsity(f: flags.FlagValues) -> None:
    """`k4p1 sparsity`."""
    quiet_tensorflow.import_quietly()
    from k4p1.runs import tables
    from k4p1.studies import sparsity as study

    found = study.sparsity_of_tasks(f.model_dir, f.task)
    for task, layers in found.items():
        rows = [
            (s.layer, f"{s.weights:,}", f"{s.zeros:,}", f"{100 * s.zeros / s.weights:.2f}", f"{s.negated:,}") for s in layers
        ]
        title = f"Mask of task '{task}': {100 * study.total(layers):.2f}% of the weights are zero"
        tables.print_rows(title, ("layer", "weights", "masked out", "%", "negated"), rows)
    if f.plot:
        study.plot(found, f.plot)
        print(f"plot: {f.plot}")


def _draw_flags(f: flags.FlagValues) -> None:
    where = "Folder of a finished run; may be repeated for runs on the same backbone."
    flags.DEFINE_multi_string("model_dir", None, where, flag_values=f, required=True)
    task_flag(f)
    output = "File to write: a picture (.svg, .png, .pdf), or the course of training (.gif)."
    flags.DEFINE_string("output", None, output, short_name="o", flag_values=f, required=True)


@command("Draw the networks of tailored tasks.", define=_draw_flags)
def draw(f: flags.FlagValues) -> None:
    """`k4p1 draw`."""
    quiet_tensorflow.import_quietly()
    from k4p1.studies import network_drawing

    print(f"picture: {network_drawing.draw(f.model_dir, f.output, f.task)}")


def _numbers(f: flags.FlagValues, name: str, number: Callable[[str], float]) -> list:
    """The numbers of a flag that takes a list."""
    try:
        return [number(text) for text in getattr(f, name)]
    except ValueError as e:
        given = ",".join(getattr(f, name))
        what = "integers" if number is int else "numbers"
        raise errors.ConfigError(f"--{name} {given}: expected {what} separated by commas") from e
