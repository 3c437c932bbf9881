"""One run: its settings and folder, what tasks start from, training, what is left at the end."""
