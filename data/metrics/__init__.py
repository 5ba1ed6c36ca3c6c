"""COCO metrics and the precision and recall beside them."""
