"""What a task owns: patch kinds, the spec that adds them up, and the layers that carry private variables."""

from k4p1.patches.kinds.dan import Dan
from k4p1.patches.kinds.depthwise import Depthwise
from k4p1.patches.kinds.full import Full
from k4p1.patches.kinds.head import Head
from k4p1.patches.kind import PatchKind
from k4p1.patches.kind import known_kinds
from k4p1.patches.kinds.lora import Lora
from k4p1.patches.kinds.mask import Mask
from k4p1.patches.kinds.nettailor import NetTailor
from k4p1.patches.kinds.packnet import PackNet
from k4p1.patches.kinds.parallel_adapter import ParallelAdapter
from k4p1.patches.kinds.scale_bias import ScaleBias
from k4p1.patches.kinds.series_adapter import SeriesAdapter
from k4p1.patches.spec import PatchSpec

__all__ = [
    "Dan",
    "Depthwise",
    "Full",
    "Head",
    "Lora",
    "Mask",
    "NetTailor",
    "PackNet",
    "ParallelAdapter",
    "PatchKind",
    "PatchSpec",
    "ScaleBias",
    "SeriesAdapter",
    "known_kinds",
]
