"""Distributed training of Pixel-Level Cycle Association for domain-adaptive semantic segmentation."""

__version__ = "0.2.0.dev0"
