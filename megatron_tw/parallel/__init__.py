"""Where groups are made and the device is picked; no other folder does either."""
