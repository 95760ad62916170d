"""What everything stands on: folders, files, errors, thresholds. It imports nothing else of this project and no torch."""
