"""Batched augmentations of raw images, to pass as a stream's `augment`."""

from clstream.augmentations import ContrastiveViews, CropFlipJitter, crop_and_flip

__all__ = ["ContrastiveViews", "CropFlipJitter", "crop_and_flip"]
