"""The loss of a task: a sum of weighted terms, each of which is logged by its name.

As text, `1.0*softmax_cross_entropy + 0.5*distillation(teacher='runs/a/tasks/animals/patch.safetensors')`; or as a mapping
from terms to weights, `{"softmax_cross_entropy": 1.0, "distillation(head=old)": 0.5}`, which takes gin's macros.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from k4p1 import checks, errors, spec_grammar
from k4p1.data.targets import SAMPLE_WEIGHT
from k4p1.engine.metrics import Batch, Metric, Outputs, PerExample
from k4p1.engine.step import Term
from k4p1.tasks import attached_terms, python_objects
from k4p1.tasks.attached_terms import Attached
from k4p1.tasks.objectives import Objective

Loss = str | Callable | Mapping[str | Callable, float]
_ONLY_TRAINING = {"label_smoothing": 0.0}  # what evaluation measures without


@dataclasses.dataclass(frozen=True)
class TermSpec:
    """A term of a loss, as given.

    Attributes:
      name: of the term.
      weight: in the sum.
      options: of the term, by name, of their types.
      function: of (batch, outputs), where the term is a Python object and not one of the objective.
    """

    name: str
    weight: float
    options: Mapping[str, Any]
    function: Callable[[Batch, Outputs], tf.Tensor] | None = None


def parse(loss: Loss, objective: Objective, defaults: Mapping[str, Any]) -> tuple[TermSpec, ...]:
    """Reads a loss.

    Args:
      loss: text or mapping, see the module; a function of (labels, logits) or a loss of Keras, see `python_objects`, alone
        or as a key of the mapping.
      objective: whose terms it may name, beside those of `k4p1.tasks.attached_terms`.
      defaults: options that terms take where they have them and do not say otherwise.

    Raises:
      ConfigError: bad syntax, an unknown term or option, or a weight that is not positive.
    """
    try:
        if callable(loss):
            loss = {loss: 1.0}
        python = {python_objects.name_of(term): term for term in loss if callable(term)} if isinstance(loss, Mapping) else {}
        if isinstance(loss, Mapping):
            listed = [
                (weight, python_objects.name_of(term), {}) if callable(term) else (weight, *_one(str(term)))
                for term, weight in loss.items()
            ]
        elif isinstance(loss, str):
            listed = list(spec_grammar.parse_weighted(loss))
        else:
            raise ValueError(
                f"{loss!r} is neither text, a mapping from terms to weights, nor a function of (labels, logits)"
            )
        if not listed:
            raise ValueError("no term is given")
    except ValueError as e:
        raise errors.ConfigError(f"loss: {e}") from e
    functions = {**objective.loss_terms, **attached_terms.OPTIONS}
    terms = []
    for weight, name, options in listed:
        if name in python:
            checks.check_number(f"loss: weight of '{name}'", weight, checks.POSITIVE)
            terms.append(TermSpec(name, float(weight), {}, python_objects.loss_function(python[name])))
            continue
        if name not in functions:
            raise errors.ConfigError(errors.unknown(f"loss term of objective '{objective.name}'", name, functions))
        checks.check_number(f"loss: weight of '{name}'", weight, checks.POSITIVE)
        known = _options_of(functions[name])
        for option in options:
            if option not in known:
                raise errors.ConfigError(errors.unknown(f"option of loss term '{name}'", option, known))
        typed = {option: _typed(name, option, text, known[option]) for option, text in options.items()}
        if "label_smoothing" in typed:
            checks.check_number(f"{name}: label_smoothing", typed["label_smoothing"], checks.SHARE)
        terms.append(TermSpec(name, float(weight), {**known, **{k: v for k, v in defaults.items() if k in known}, **typed}))
    names = [term_name(terms, number) for number in range(len(terms))]
    for name in names:
        if names.count(name) > 1:
            raise errors.ConfigError(f"loss: term '{name}' is given twice; add up its weights")
    return tuple(terms)


def _one(text: str) -> tuple[str, dict[str, str]]:
    """The term of a mapping's key."""
    terms = list(spec_grammar.parse(text))
    if len(terms) > 1:
        raise ValueError(f"{text!r} holds {len(terms)} terms; give each its own weight")
    return terms[0]


def term_name(terms: Sequence[TermSpec], number: int) -> str:
    """The name by which a term is logged; terms with several teachers are numbered."""
    name = terms[number].name
    alike = [index for index, term in enumerate(terms) if term.name == name]
    return name if len(alike) == 1 or name not in attached_terms.WITH_TEACHER else f"{name}_{alike.index(number)}"


class TaskLoss:
    """The terms of a loss as functions of (batch, outputs).

    Args:
      terms: of the loss.
      objective: whose they are.
      attached: terms that were attached to the task model, by their position.
      class_weights: of the classes, in training alone; empty: 1 for all.
    """

    def __init__(
        self,
        terms: Sequence[TermSpec],
        objective: Objective,
        attached: Mapping[int, Attached] | None = None,
        class_weights: Sequence[float] = (),
    ):
        self._terms, self._objective, self._attached = terms, objective, attached or {}
        self._class_weights = tuple(class_weights)
        self.names = [term_name(terms, number) for number in range(len(terms))]

    @classmethod
    def of(cls, loss: Loss, objective: Objective, **defaults: Any) -> "TaskLoss":
        """A loss of text or mapping without attached terms; see `parse`."""
        return cls(parse(loss, objective, defaults), objective)

    def __call__(self, batch: Batch, outputs: Outputs) -> dict[str, Term]:
        """The terms by name, each the mean over the batch: `sum_i w_i c_i l_i / max(sum_i w_i, 1)`.

        w_i is 0 for an image that cannot be read, else 1; c_i the example's importance, its `sample_weight` in the data
        times the weight of its class.
        """
        weights = batch["weight"]
        found = {}
        each = weights * self._importance(batch)
        for number, term in enumerate(self._terms):
            losses = self._function(number, {})(batch, outputs)
            mean = tf.reduce_sum(each * losses) / tf.maximum(tf.reduce_sum(weights), 1.0)
            found[self.names[number]] = Term(mean, term.weight)
        return found

    def _importance(self, batch: Batch) -> tf.Tensor | float:
        importance = tf.cast(batch[SAMPLE_WEIGHT], tf.float32) if SAMPLE_WEIGHT in batch else 1.0
        return importance * tf.gather(self._class_weights, batch["label"]) if self._class_weights else importance

    def metrics(self) -> dict[str, Metric]:
        """`loss`, the weighted sum per example, as evaluation measures it; and each term by name where there are several."""
        functions = {name: self._function(number, _ONLY_TRAINING) for number, name in enumerate(self.names)}
        weights = {name: term.weight for name, term in zip(self.names, self._terms, strict=True)}

        def total(batch: Batch, outputs: Outputs) -> tf.Tensor:
            return sum(weights[name] * function(batch, outputs) for name, function in functions.items())

        is_plain = len(functions) == 1 and weights[self.names[0]] == 1.0
        whole = {"loss": PerExample(functions[self.names[0]] if is_plain else total, larger_is_better=False)}
        parts = {f"loss_{name}": PerExample(function, larger_is_better=False) for name, function in functions.items()}
        more: dict[str, Metric] = {}
        for number, term in self._attached.items():
            more |= {name if name not in more else f"{name}_{number}": metric for name, metric in term.metrics().items()}
        return {**whole, **(parts if len(parts) > 1 else {}), **more}

    def _function(self, number: int, changed: Mapping[str, Any]) -> Callable[[Batch, Outputs], tf.Tensor]:
        term = self._terms[number]
        if number in self._attached:
            return self._attached[number].loss
        if term.function is not None:
            return term.function
        function = self._objective.loss_terms[term.name]
        known = _options_of(function)
        return functools.partial(function, **{**term.options, **{k: v for k, v in changed.items() if k in known}})


def _options_of(function: Callable) -> dict[str, Any]:
    """The keyword-only options of a loss term with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY}


def _typed(term: str, option: str, text: str, default: Any) -> Any:
    try:
        return spec_grammar.read(text, type(default))
    except ValueError as e:
        raise errors.ConfigError(f"{term}({option}={text}): {e}") from None
