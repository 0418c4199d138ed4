"""Plain data on disk and in memory, without torch: instances, cost and exit tables, measurements, runs."""
