"""Engine parts that MONAI and Ignite lack."""
