"""Detection of objects: images with boxes in COCO's layout, what detectors are given, and how they are scored."""
