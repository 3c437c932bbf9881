"""Sizes in bytes as people write them."""

import re

from k4p1 import errors

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, what: str) -> int:
    """Bytes of a text such as `200KB` (200,000), `1.5MB` or `64KiB` (65,536).

    Raises:
      ConfigError: no such size; `what` says where it was given.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise errors.ConfigError(f"{what} {text}: expected a number and B, KB, MB, GB, KiB, MiB or GiB, such as 200KB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
