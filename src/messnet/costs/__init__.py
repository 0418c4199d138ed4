"""What a model costs: multiply-accumulates, memory, measured time."""
