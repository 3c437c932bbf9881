"""Patch files, folding, SavedModels."""

from k4p1.export.fold import fold
from k4p1.export.patch_file import load_patch
from k4p1.export.patch_file import save_patch
from k4p1.export.saved_model import export_task

__all__ = ["export_task", "fold", "load_patch", "save_patch"]
