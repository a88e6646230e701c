"""What a run is made of: wrapped model, optimizer, checkpoints, metrics."""
