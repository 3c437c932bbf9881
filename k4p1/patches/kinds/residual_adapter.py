"""What series and parallel residual adapters have in common: which layers they fit, and the matrix alpha (RA, section 3)."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import keras
from keras import ops

from k4p1 import errors
from k4p1.backbones.series_adapters import he_std
from k4p1.patches import kind, patched_layer

BLOCKS = ("all", "second")
SAME, ZERO, HE = "same", "zero", "he"
INITS = (SAME, ZERO, HE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterKind(kind.PatchKind):
    """Options of residual adapters.

    Attributes:
      block: `all` convolutions, or the `second` of each residual block only (RA, section 4.1: "half").
      rank: K of `alpha = beta @ gamma.T`; 0 trains alpha whole.
      init: `same` leaves the network unchanged at the start: alpha is zero, or where the backbone was trained with series
        adapters, theirs; `zero`; `he`: alpha is random with standard deviation sqrt(2 / D), D output channels, as RA's
        authors begin.
      init_std: another standard deviation of the initial values of alpha, or with a rank of gamma, in place of `init`.
      dropout: rate of dropout on what the adapter reads, in training.
      dropout_block: where that dropout is: before the `second` adapter of each residual block (RA, section 4.1), or `all`.
    """

    renamed_options: ClassVar[Mapping[str, str]] = {"std": "init_std"}

    block: str = "all"
    rank: int = 0
    init: str = SAME
    init_std: float = 0.0
    dropout: float = 0.0
    dropout_block: str = "second"

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("block", BLOCKS)
        self._check_choice("dropout_block", BLOCKS)
        self._check_choice("init", INITS)
        if self.init != SAME and (self.init_std or (self.rank and self.init == HE)):
            other = f"init_std={self.init_std}" if self.init_std else f"rank={self.rank}"
            raise errors.PatchError(
                f"{self.name}(init={self.init},{other}): init=he is of a whole alpha, and init_std= stands in its place; "
                "give one of them"
            )
        if self.rank < 0:
            raise errors.PatchError(f"{self.name}(rank={self.rank}): expected 1 or more, or 0 for a whole alpha")
        if self.init_std < 0:
            raise errors.PatchError(f"{self.name}(init_std={self.init_std}): expected 0 or more")
        if not 0 <= self.dropout < 1:
            raise errors.PatchError(f"{self.name}(dropout={self.dropout}): expected a rate in [0, 1)")

    def fits(self, site, network):
        return why_no_adapter(site.layer) is None and (self.block == "all" or site.block_position == 2)

    def why_nothing(self, network):
        if self.block == "second" and any(why_no_adapter(site.layer) is None for site in network):
            return "it has no residual block with a second convolution; leave block=second out"
        reasons = {why for site in network if (why := why_no_adapter(site.layer)) is not None}
        return f"residual adapters need convolutions of all channels; it has {', '.join(sorted(reasons))}"

    def std_of(self, layer: keras.layers.Layer) -> float:
        """The standard deviation with which an adapter of `layer` starts."""
        return he_std(layer.filters) if self.init == HE else self.init_std

    def _dropout_at(self, site) -> float:
        return self.dropout if self.dropout_block == "all" or site.block_position == 2 else 0.0


def why_no_adapter(layer: keras.layers.Layer) -> str | None:
    """Why a layer cannot have a residual adapter, or None: 1x1 kernels mix all channels of an ungrouped convolution."""
    if type(layer) not in (keras.layers.Conv1D, keras.layers.Conv2D):
        return f"{type(layer).__name__} layers"
    if layer.groups != 1:
        return f"grouped convolutions ('{layer.name}': a 1x1 kernel over all channels would not fold into its groups)"
    return None


class Adapter(patched_layer.LayerPatch):
    """Owns alpha (C, D), or its factors beta (C, K) and gamma (D, K) with `alpha = beta @ gamma.T`.

    After joint compression beta or gamma belongs to several tasks (RA, section 3.4): see `adopt`.

    Args:
      rank: K; 0 for a whole alpha.
      std: of the initial values of alpha, or of gamma; 0 makes alpha zero.
      dropout: rate on what the adapter reads.
      joint: `beta` or `gamma`, the factor that is shared with other tasks and stays as it is; empty for none. True, of
        models saved by version 0.1, is `beta`.
    """

    def __init__(self, rank: int = 0, std: float = 0.0, dropout: float = 0.0, joint: str | bool = "", **kwargs):
        super().__init__(**kwargs)
        self.rank, self.std, self.rate = rank, std, dropout
        self.joint = "beta" if joint is True else joint or ""
        self._adopted: keras.Variable | None = None
        self.dropped = keras.layers.Dropout(dropout) if dropout else None

    def adopt(self, factors):
        self.joint = next((name for name in ("beta", "gamma") if name in factors), self.joint)
        self._adopted = factors.get(self.joint)
        if self._adopted is not None:
            self.rank = self._adopted.shape[1]

    def bind_matrix(self, layer: keras.layers.Layer, rows: int, columns: int) -> None:
        """Creates the matrix of (rows, columns).

        Raises:
          PatchError: a rank larger than the channels.
        """
        start = keras.initializers.RandomNormal(stddev=self.std) if self.std else "zeros"
        if not self.rank:
            self.alpha = self.add_weight(name="alpha", shape=(rows, columns), initializer=start)
            return
        if self.rank > min(rows, columns) and not self.joint:
            raise errors.PatchError(
                f"{self.kind}(rank={self.rank}) is more than layer '{layer.name}' has channels: {rows} in, {columns} out; "
                f"expected at most {min(rows, columns)}, or other layers="
            )
        self.beta = self._factor("beta", rows, "glorot_uniform")
        self.gamma = self._factor("gamma", columns, start)

    def _factor(self, name: str, channels: int, start) -> keras.Variable:
        if name == self.joint and self._adopted is not None:
            return self._adopted
        shape = (channels, self.rank)
        return self.add_weight(name=name, shape=shape, initializer=start, trainable=name != self.joint)

    def matrix(self):
        """alpha, (C, D)."""
        return ops.matmul(self.beta, ops.transpose(self.gamma)) if self.rank else ops.convert_to_tensor(self.alpha)

    def private_variables(self):
        common = self._adopted
        return [
            patched_layer.PrivateVariable(p.kind, p.name, p.variable, patched_layer.FIXED) if p.variable is common else p
            for p in super().private_variables()
        ]

    def get_config(self):
        return {**super().get_config(), "rank": self.rank, "std": self.std, "dropout": self.rate, "joint": self.joint}
