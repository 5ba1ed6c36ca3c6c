"""COCO metrics, and precision and recall."""
