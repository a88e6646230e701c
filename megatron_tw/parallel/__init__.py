"""Where groups are made, the device is picked, and zigzag slices are known; no other folder does any of the three."""
