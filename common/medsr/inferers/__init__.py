"""Inferers for networks whose output is finer than their input."""
