"""Stands in for torchvision, of which MONAI Label imports two functions for debug images on start.

The torchvision of the package index is built for CUDA and cannot be imported beside a CPU torch.
"""
