"""What every module stands on: errors, configuration, randomness, files, processes."""
