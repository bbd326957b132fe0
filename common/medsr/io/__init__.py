"""Strict readers that name the fault, and writers that leave a whole file or none."""
