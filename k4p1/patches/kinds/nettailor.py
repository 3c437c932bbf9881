"""NetTailor: blocks of the backbone that stay, and small proxies in place of the others (NT)."""

import dataclasses
from typing import ClassVar

from k4p1 import errors
from k4p1.backbones import blocks, canonical
from k4p1.patches import kind
from k4p1.patches.tailored import paths
from k4p1.patches.tailored.network import PROXIES, TailoredNetwork


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetTailor(kind.PatchKind):
    """`x_i = relu(a_i0 G_i(x_{i-1}) + sum_s a_is A_si(x_s))`, `a_i = softmax(w_i)`, s from i - k to i - 1.

    G_i are the backbone's blocks and stay shared; the proxies A (pooling, 1x1 convolution, batch normalisation) and w are
    the task's. Frozen normalisations keep the backbone's statistics; `scale_bias(affine=frozen)` beside this kind gives the
    task statistics of its own, as the authors' code does unnoticed. After pruning, `live` lists the paths that are left; a
    dead block or proxy is in neither model nor file.

    Attributes:
      k: longest skip of a proxy, a whole number from 1, or `dense`.
      proxy: `basic`, or `bottleneck` (with a hidden layer of `max(channels // 32, 16)` channels).
      blocks: glob over layers that end the stem (the first match) and each block; empty: found from the structure.
      group: so many blocks make one.
      live: the paths of a pruned network, see `k4p1.patches.tailored.paths`; empty: all.
      momentum: of the proxies' moving statistics.
      recalibrate: replace them by population statistics after training.
    """

    name: ClassVar[str] = "nettailor"
    summary: ClassVar[str] = "the architecture: proxies that replace frozen blocks (NT)"

    k: str = "3"
    proxy: str = "basic"
    blocks: str = ""
    group: int = 1
    live: str = ""
    momentum: float = 0.9
    recalibrate: bool = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "k", str(self.k))
        if self.k != paths.DENSE and not (self.k.isdigit() and int(self.k) >= 1):
            raise errors.PatchError(f"nettailor(k={self.k}): expected a whole number of at least 1, or 'dense'")
        self._check_choice("proxy", PROXIES)
        self._check_momentum(self.momentum)
        if self.group < 1:
            raise errors.PatchError(f"nettailor(group={self.group}): expected a whole number of at least 1")
        if (self.layers, self.stage) != ("*", "all"):
            raise errors.PatchError(
                "nettailor(layers=..., stage=...): it concerns the whole network; name its blocks by blocks='GLOB'"
            )
        if self.live:
            paths.from_text(self.live)

    def conflict(self, kinds):
        if any(kind.name == "full" for kind in kinds):
            return "'nettailor' leaves the blocks shared, 'full' makes them private; give one of them"
        return None

    def fits(self, site, network):
        return False

    def select(self, network):
        return []  # it patches no layer; see `rewire`

    def rewire(self, model, layer_for, seed):
        found = blocks.find_blocks(model, self.blocks, self.group)
        chosen = paths.full(len(found), self.k)
        if self.live:
            given = paths.from_text(self.live)
            unknown = [path for path in given if path not in chosen]
            if unknown:
                raise errors.PatchError(
                    f"nettailor(live={self.live}): '{unknown[0]}' is no path of {len(found)} blocks with k={self.k}"
                )
            chosen = paths.live(given, len(found))
        operations = {operation.name: operation for operation in canonical.operations(model)}
        return TailoredNetwork(
            found,
            chosen,
            layer_for,
            operations,
            proxy=self.proxy,
            momentum=self.momentum,
            recalibrate=self.recalibrate,
            seed=seed,
        )
