"""What is done once, before or after a training run: scoring rows with a frozen model, converting checkpoints."""
