"""`python -m k4p1`."""

from k4p1.cli.main import entry

if __name__ == "__main__":
    entry()
