"""The graph of a tailored network: blocks of the backbone, proxies beside them, sums by attention (NT, section 3.3)."""

import functools
import time
from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import ops

from k4p1 import errors
from k4p1.backbones.blocks import Block
from k4p1.backbones.followers import NORMALISATIONS
from k4p1.patches import costs, rewiring
from k4p1.patches.own_layer import OwnLayer
from k4p1.patches.tailored import complexity, layers
from k4p1.patches.tailored.complexity import Cost
from k4p1.patches.tailored.paths import Path

PROXIES = ("basic", "bottleneck")
_TIMED = 8


class TailoredNetwork(rewiring.Rewiring):
    """Rewires a backbone into `x_i = activation(a_i0 G_i(x_{i-1}) + sum_s a_is A_si(x_s))`.

    Args:
      blocks: of the backbone.
      paths: that are live.
      layer_for: the layer that stands for one of the backbone.
      operations: of the backbone, by name.
      proxy: `basic`, or `bottleneck` with `max(channels // 32, 16)` channels inside.
      momentum, recalibrate: of the proxies' statistics.
      seed: of the proxies' initial values.

    Attributes:
      nodes: x_0 to x_L by index, those that live paths reach.
      attention: of each node's paths, by node.
      into: the live paths into each node, the main one first.
      costs: of each path of the network, proxies that are not live left out.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        paths: Sequence[Path],
        layer_for: rewiring.LayerFor,
        operations: Mapping[str, keras.Operation],
        *,
        proxy: str,
        momentum: float,
        recalibrate: bool,
        seed: int,
    ):
        self.blocks, self.paths = tuple(blocks), tuple(paths)
        self._proxy, self._layer_for, self._operations, self._seed = proxy, layer_for, operations, seed
        self._statistics = {"momentum": momentum, "recalibrated": recalibrate}
        self.layers: dict[str, OwnLayer] = {}
        self.nodes: dict[int, keras.KerasTensor] = {}
        self.attention: dict[int, keras.KerasTensor] = {}
        self.costs: dict[Path, Cost] = {}
        self._stem = Cost()
        self.into = {n: tuple(p for p in paths if p.node == n) for n in range(1, len(blocks) + 1)}
        self.into = {node: into for node, into in self.into.items() if into}
        self._ends = {block.end: number for number, block in enumerate(blocks, 1)}
        self._activations = {block.activation: number for number, block in enumerate(blocks, 1) if block.activation}
        self._pools: dict[tuple[int, int], keras.layers.Layer] = {}
        self._mains: dict[int, keras.KerasTensor] = {}
        self._running = Cost()

    @property
    def mixings(self) -> dict[int, layers.Mixing]:
        """The sums of paths by node."""
        return {node: self.layers[f"block_{node}"] for node in self.into}

    @property
    def rest(self) -> Cost:
        """What stands before the first block and behind the last one, the head left out."""
        return self._stem + self._running

    def after(self, name, operation, output):
        self._running += _cost(operation, output)
        if name == self.blocks[0].source and 0 not in self.nodes:
            self._stem, self._running = self._running, Cost()
            self.nodes[0] = _checked(name, output)
        elif name in self._ends:
            node = self._ends[name]
            self.costs[Path(node, node - 1, True)], self._running = self._running, Cost()
            self._mains[node] = output
            if node in self.into:
                output, self.attention[node] = self._mixed(node, output)
                if self.blocks[node - 1].activation is None:
                    self.nodes[node] = _checked(name, output)
        elif name in self._activations and self._activations[name] in self.into:
            self.nodes[self._activations[name]] = _checked(name, output)
        return output

    def local(self, node: int) -> keras.KerasTensor:
        """x_i of inputs that no gradient passes: `activation(a_i0 stop(G_i) + sum_s a_is A_si(stop(x_s)))`.

        The values, batch statistics included, are those of x_i; the block itself is computed once.
        """
        ways = []
        for path in self.into[node]:
            source = ops.stop_gradient(self._mains[node] if path.is_main else self.nodes[path.source])
            ways.append(source if path.is_main else self._proxied(path, source, output_of=self._mains[node], moves=False))
        z, _ = self.layers[f"block_{node}"](ways)
        activation = self.blocks[node - 1].activation
        return z if activation is None else self._layer_for(self._operations[activation])(z)

    def attention_now(self) -> dict[Path, float]:
        """The attention of each live path."""
        return {
            path: float(a)
            for node, mixing in self.mixings.items()
            for path, a in zip(self.into[node], mixing.weights_now(), strict=True)
        }

    def live_cost(self) -> Cost:
        """Of live blocks, live proxies and the rest."""
        return sum((self.costs[path] for path in self.paths), self.rest)

    def whole_cost(self) -> Cost:
        """Of the backbone."""
        return sum((cost for path, cost in self.costs.items() if path.is_main), self.rest)

    def facts(self):
        live, whole = self.live_cost(), self.whole_cost()
        return {
            "blocks": len(self.blocks),
            "live_blocks": sum(path.is_main for path in self.paths),
            "live_proxies": sum(not path.is_main for path in self.paths),
            "backbone_parameters": whole.parameters,
            "live_parameters": live.parameters,
            "backbone_multiply_adds": whole.multiply_adds,
            "live_multiply_adds": live.multiply_adds,
        }

    def shares(self, cost: str) -> dict[Path, float]:
        """The share of each live path in the cost of the whole network.

        Args:
          cost: `multiply_adds`, `parameters`, or `milliseconds`, which are measured here.

        Raises:
          ConfigError: another cost.
        """
        if cost not in complexity.COSTS:
            raise errors.ConfigError(errors.unknown("cost of complexity", cost, complexity.COSTS))
        if cost == "milliseconds":
            image = keras.utils.get_source_inputs(self.nodes[0])[0]
            return complexity.shares(self._milliseconds(), self._timed(image, self.nodes[0]))
        return complexity.shares({p: getattr(found, cost) for p, found in self.costs.items()}, getattr(self.rest, cost))

    def _mixed(self, node: int, main: keras.KerasTensor) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        into = self.into[node]
        ways = [
            main if path.is_main else self._proxied(path, self.nodes[path.source], output_of=main, moves=True)
            for path in into
        ]
        name = f"block_{node}"
        mixing = layers.Mixing(into[0].is_main, len(into), name=f"nettailor_{name}")
        self.layers[name] = mixing
        for rank, path in enumerate(into):
            if not path.is_main:
                ends = self.layers[f"proxy_{path.source}_{node}"]
                ends.attention_of_path = functools.partial(_attention_of, mixing, rank)
        return mixing(ways)

    def _proxied(
        self, path: Path, source: keras.KerasTensor, output_of: keras.KerasTensor, moves: bool
    ) -> keras.KerasTensor:
        """A proxy called on a node; its layers are made at the first call."""
        how = {} if moves else {"moves": False}  # only said where it is unusual: a folded layer knows no such argument
        name, channels = f"proxy_{path.source}_{path.node}", output_of.shape[-1]
        x = self._pooled(path.source, source, output_of)
        if self._proxy == "bottleneck":
            hidden = self._convolution(f"{name}_reduce", max(channels // 32, 16), relu=True)
            x = hidden(x, **how)
        convolution = self._convolution(name, channels)
        x = convolution(x, **how)
        if path not in self.costs:
            positions = int(np.prod(output_of.shape[1:-1]))
            parts = [self.layers[n] for n in (f"{name}_reduce", name) if n in self.layers]
            self.costs[path] = Cost(
                sum(part.multiply_adds(positions) for part in parts),
                positions * sum(part.filters for part in parts),
                sum(int(np.prod(v.shape)) for part in parts for v in part.trainable_variables),
            )
        return x

    def _pooled(self, number: int, source: keras.KerasTensor, output_of: keras.KerasTensor) -> keras.KerasTensor:
        ratio = max(1, round(source.shape[1] / output_of.shape[1]))
        if ratio > 1:
            key = (number, ratio)
            if key not in self._pools:
                self._pools[key] = layers.ProxyPooling(ratio, name=f"nettailor_pool_{number}_{ratio}")
            source = self._pools[key](source)
        if tuple(source.shape[1:-1]) != tuple(output_of.shape[1:-1]):
            sizes = ["x".join(map(str, tensor.shape[1:-1])) for tensor in (source, output_of)]
            raise errors.PatchError(
                f"a proxy from node {number} gives maps of {sizes[0]}, the block has {sizes[1]}: blocks must halve the "
                "resolution with padding; give another image size, or other blocks"
            )
        return source

    def _convolution(self, name: str, filters: int, relu: bool = False) -> layers.ProxyConvolution:
        if name not in self.layers:
            self.layers[name] = layers.ProxyConvolution(
                filters, relu, seed=self._seed + len(self.layers), name=f"nettailor_{name}", **self._statistics
            )
        return self.layers[name]

    def _milliseconds(self) -> dict[Path, float]:
        found = {}
        for path in self.paths:
            source = self.nodes[path.source]
            mixing = self.layers[f"block_{path.node}"]
            way = keras.tree.flatten(mixing._inbound_nodes[0].input_tensors)[self.into[path.node].index(path)]
            found[path] = self._timed(source, way)
        return found

    @staticmethod
    def _timed(inputs: keras.KerasTensor, output: keras.KerasTensor) -> float:
        """Milliseconds of one call on a batch, the median of several."""
        part = keras.Model(inputs, output)
        x = np.zeros((_TIMED, *inputs.shape[1:]), "float32")
        part.predict_on_batch(x)
        times = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            part.predict_on_batch(x)
            times.append(1e3 * (time.perf_counter() - start))
        return float(np.median(times))


def _attention_of(mixing: layers.Mixing, rank: int) -> float:
    return float(mixing.weights_now()[rank])


def _checked(name: str, output: keras.KerasTensor) -> keras.KerasTensor:
    if keras.config.image_data_format() != "channels_last" or len(output.shape) != 4:
        raise errors.PatchError(f"'{name}' puts out {output.shape}: blocks lead from feature maps (height, width, channels)")
    return output


def _cost(operation: keras.Operation, output: keras.KerasTensor) -> Cost:
    """Of one layer of the backbone."""
    if not isinstance(operation, keras.layers.Layer):
        return Cost()
    shape = keras.tree.flatten(output)[0].shape[1:]
    normalised = int(np.prod(shape)) if isinstance(operation, keras.layers.BatchNormalization) else 0
    parameters = sum(int(np.prod(v.shape)) for v in operation.variables if not v.name.startswith("moving_"))
    parameters = parameters if operation.weights else 0  # a dropout owns but a seed
    positions = int(np.prod(shape if isinstance(operation, NORMALISATIONS) else shape[:-1]))
    return Cost(costs.of_layer(operation, positions), normalised, parameters)
