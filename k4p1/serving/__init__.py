"""What answers: SavedModels, sets of patches, predictions."""
