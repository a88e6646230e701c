"""What a run is made of: how a program opens, optimizer, checkpoints, metrics."""
