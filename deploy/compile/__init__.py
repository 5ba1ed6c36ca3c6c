"""What NVIDIA's compiler makes of a graph: TensorRT for RTX builds it without a GPU, and its log lists the kernels."""
