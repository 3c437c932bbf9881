"""What a task owns: patch kinds, the spec that adds them up, and the layers that carry private variables."""

from k4p1.patches.depthwise import Depthwise
from k4p1.patches.full import Full
from k4p1.patches.head import Head
from k4p1.patches.kind import PatchKind
from k4p1.patches.kind import known_kinds
from k4p1.patches.scale_bias import ScaleBias
from k4p1.patches.spec import PatchSpec

__all__ = ["Depthwise", "Full", "Head", "PatchKind", "PatchSpec", "ScaleBias", "known_kinds"]
