"""What the subcommands do: flags in, text and files out."""

import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from k4p1 import config, errors, gin_files, sizes
from k4p1.cluster.parent import end_with_parent
from k4p1.cluster.restart import start_again
from k4p1.engine.optimization import Optimization
from k4p1.experiments import compress as compression
from k4p1.experiments import evaluate as evaluation
from k4p1.experiments import inspection, sparsity_report, tables


def run(name: str, f: flags.FlagValues) -> int:
    """`k4p1 train`, `finetune` and `decathlon`, on this machine or as coordinator of the cluster in `TF_CONFIG`."""
    end_with_parent(gently=True)
    # A file on the command line replaces the default one.
    text = config.load(f.gin_file, f.gin_bindings)

    def texts() -> Mapping[str, str]:
        for binding in config.unread():
            print(f"k4p1: warning: nobody reads binding '{binding}'", file=sys.stderr)
        command = " ".join(map(shlex.quote, ["k4p1", *sys.argv[1:]]))
        return {"config.gin": text, "operative_config.gin": config.operative(), "command.txt": command + "\n"}

    gin_hash = gin_files.digest(f.gin_file, f.gin_bindings)
    try:
        config.CONFIGURABLES[name](model_dir=f.model_dir, dry_run=f.dry_run, resume=f.resume, gin_hash=gin_hash, texts=texts)
    except TypeError as e:
        missing = str(e).splitlines()[0]
        if "argument" not in missing:
            raise
        raise errors.ConfigError(f"{missing}; is {', '.join(f.gin_file)} a file for 'k4p1 {name}'?") from e
    except errors.ServerLostError as e:
        start_again(e)
    return 0


def evaluate(f: flags.FlagValues) -> None:
    """`k4p1 evaluate`."""
    found = evaluation.evaluate(f.model_dir, f.task, f.split, f.data)
    rows = []
    for task, metrics in found.items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "examples")
        rows.append((task, f"{metrics['examples']:,.0f}", shown))
    tables.print_rows(f"Split {f.split}", ("task", "examples", "metrics"), rows)


def predict(f: flags.FlagValues, images: Sequence[str]) -> None:
    """`k4p1 predict`."""
    found = evaluation.predict(f.model_dir, f.task, images, f.top)
    rows = [(path, ", ".join(f"{label} {probability:.3f}" for label, probability in best)) for path, best in found]
    tables.print_rows("Predictions", ("image", "label and probability"), rows)


def export(f: flags.FlagValues) -> None:
    """`k4p1 export`."""
    for task, (path, difference) in evaluation.export(f.model_dir, f.export_dir, f.task).items():
        print(f"task '{task}': {path}; largest difference of the logits on a probe batch: {difference:.2g}")


def compress(f: flags.FlagValues) -> None:
    """`k4p1 compress`."""
    output = pathlib.Path(f.output_dir or pathlib.Path(f.model_dir[0]) / "compressed").expanduser()
    budget = None if f.budget is None else sizes.parse_bytes(f.budget, "--budget")
    optimization = Optimization(learning_rate=f.learning_rate)
    done = compression.compress(f.model_dir, output, f.tasks, f.rank, budget, f.finetune_steps, optimization)
    columns = ["task", "accuracy before", "after", *(["fine-tuned"] if done.accuracy_finetuned else [])]
    measured = [done.accuracy_before, done.accuracy_after, *([done.accuracy_finetuned] if done.accuracy_finetuned else [])]
    rows = [(task, *(f"{accuracy[task]:.4f}" for accuracy in measured)) for task in done.accuracy_before]
    tables.print_rows("Joint compression", columns, rows)
    ranks = sorted(done.ranks.values())
    print(f"ranks of {len(ranks)} layers: {ranks[0]} to {ranks[-1]}; energy kept: {100 * done.energy:.2f}%")
    share = done.bytes_after / done.bytes_before
    print(f"adapters: {done.bytes_before:,} bytes before, {done.bytes_after:,} after, shared factors included ({share:.0%})")
    print(f"compressed tasks: {done.folder}")
    if done.accuracy_finetuned:
        print(f"fine-tuned tasks: {done.folder / compression.FINETUNED}")


def sparsity(f: flags.FlagValues) -> None:
    """`k4p1 sparsity`."""
    found = sparsity_report.sparsity_of_tasks(f.model_dir, f.task)
    for task, layers in found.items():
        rows = [
            (s.layer, f"{s.weights:,}", f"{s.zeros:,}", f"{100 * s.zeros / s.weights:.2f}", f"{s.negated:,}") for s in layers
        ]
        title = f"Mask of task '{task}': {100 * sparsity_report.total(layers):.2f}% of the weights are zero"
        tables.print_rows(title, ("layer", "weights", "masked out", "%", "negated"), rows)
    if f.plot:
        sparsity_report.plot(found, f.plot)
        print(f"plot: {f.plot}")


def inspect(f: flags.FlagValues, paths: Sequence[str]) -> None:
    """`k4p1 inspect`."""
    for path in paths:
        for title, rows in inspection.inspect(path):
            print(title)
            for name, value in rows:
                print(f"  {name:<22} {value}")


def configs(f: flags.FlagValues) -> None:
    """`k4p1 configs`."""
    for name, summary in gin_files.shipped().items():
        print(f"{name:<24} {summary}")
