"""`python -m k4p1` is the command line."""

import sys

from k4p1.cli import main

sys.exit(main())
