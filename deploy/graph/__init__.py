"""ONNX files and graphs: reading, passes, shapes, drawing."""
