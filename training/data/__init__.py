"""Data sets, folders of images and augmentation."""
