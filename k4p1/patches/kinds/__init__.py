"""The patch kinds, one file each."""
