"""Packing: what goes in comes out, in TensorFlow and on the host."""

import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from k4p1.engine.packing import Packing

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_round_trip(shapes):
    packing = Packing(tuple(f"v{i}" for i in range(len(shapes))), tuple(shapes))
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in zip(packing.names, shapes, strict=True)}
    vector = packing.pack_numpy(arrays)
    assert vector.shape == (packing.size,)
    np.testing.assert_array_equal(packing.pack([arrays[n] for n in packing.names]).numpy(), vector)
    for name, array in arrays.items():
        np.testing.assert_array_equal(packing.unpack_numpy(vector)[name], array)
        np.testing.assert_array_equal(packing.unpack(tf.constant(vector))[name].numpy(), array)
