"""Run functions: what a user starts, in Python or from a gin file."""
