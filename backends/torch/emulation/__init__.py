"""Vendor devices imitated on the CPU; a result obtained here is from an emulated device, never from hardware."""
