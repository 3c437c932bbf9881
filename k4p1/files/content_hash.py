"""A hash over named tensors that does not depend on file layout or byte order (design: safetensors has no checksum)."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np


def digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, object] | None = None) -> str:
    """SHA-256, in hex, of canonical metadata and of the tensors in the order of their names.

    Each tensor counts with name, dtype, shape and little-endian bytes in C order.
    """
    sha = hashlib.sha256(canonical_json(metadata or {}).encode())
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        sha.update(canonical_json([name, array.dtype.name, list(array.shape)]).encode())
        sha.update(little.tobytes())
    return sha.hexdigest()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
