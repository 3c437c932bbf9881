"""`python -m k4p1`."""

from k4p1.cli import entry

if __name__ == "__main__":
    entry()
