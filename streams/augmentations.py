"""Batched augmentations of raw images, to pass as a stream's `augment`."""

from clstream.augmentations import CropFlipJitter, crop_and_flip

__all__ = ["CropFlipJitter", "crop_and_flip"]
