"""A run before its GPUs are booked: the real training step simulated, and layouts searched."""

from megatron_tw.config.quiet import quiet_libraries

quiet_libraries()  # here, because the processes of simulations import Megatron-Core before anything else
