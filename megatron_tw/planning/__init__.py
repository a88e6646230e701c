"""A run before its GPUs are booked: the real training step simulated, and layouts searched."""
