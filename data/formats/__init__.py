"""Dataset formats: YOLO trees, COCO JSON, and the synthetic set."""
