"""Used by every other module: errors, configuration, randomness, files, processes."""
