"""Input pipelines: TFDS names and directories, image folders, arrays, the embedded digits."""

from k4p1.data.arrays import Arrays
from k4p1.data.arrays import embedded
from k4p1.data.image_folder import ImageFolder
from k4p1.data.open_source import open_source
from k4p1.data.pipeline import Pipeline
from k4p1.data.source import Source
from k4p1.data.splits import Splits
from k4p1.data.targets import ClassLabel
from k4p1.data.targets import Targets
from k4p1.data.tfds_source import Tfds

__all__ = [
    "Arrays",
    "ClassLabel",
    "ImageFolder",
    "Pipeline",
    "Source",
    "Splits",
    "Targets",
    "Tfds",
    "embedded",
    "open_source",
]
