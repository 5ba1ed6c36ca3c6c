"""The graph check: findings for any Q/DQ ONNX file."""
