"""What a task owns: patch kinds, the spec that adds them up, and the layers that carry private variables."""

from k4p1.patches.dan import Dan
from k4p1.patches.depthwise import Depthwise
from k4p1.patches.full import Full
from k4p1.patches.head import Head
from k4p1.patches.kind import PatchKind
from k4p1.patches.kind import known_kinds
from k4p1.patches.lora import Lora
from k4p1.patches.mask import Mask
from k4p1.patches.packnet import PackNet
from k4p1.patches.parallel_adapter import ParallelAdapter
from k4p1.patches.scale_bias import ScaleBias
from k4p1.patches.series_adapter import SeriesAdapter
from k4p1.patches.spec import PatchSpec

__all__ = [
    "Dan",
    "Depthwise",
    "Full",
    "Head",
    "Lora",
    "Mask",
    "PackNet",
    "ParallelAdapter",
    "PatchKind",
    "PatchSpec",
    "ScaleBias",
    "SeriesAdapter",
    "known_kinds",
]
