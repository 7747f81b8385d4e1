"""The region loss under the conventions of segmentation frameworks."""
