"""Run functions, named after their command or method."""
