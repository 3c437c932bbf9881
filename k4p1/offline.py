"""Whether this process may download: one environment variable, which processes that it starts inherit."""

import os

VARIABLE = "K4P1_OFFLINE"


def is_offline() -> bool:
    """Whether nothing may be downloaded."""
    return bool(os.environ.get(VARIABLE))


def stay_offline() -> None:
    """From now on nothing is downloaded, here and in processes that this one starts."""
    os.environ[VARIABLE] = "1"
