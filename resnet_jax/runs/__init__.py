"""What surrounds a run: its folder, lock, signals, processes, trackers, progress and report."""
