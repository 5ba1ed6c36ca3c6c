"""Which units to quantize so that the engine is fast: costs by unit and precision, and a search over them.

Costs come from engines that are built with different plans: on a GPU that is not here they are estimated from the
kernels of the build (`roofline`), on a runtime that reports times by layer they are measured. Either way each block of
the graph has a cost in each combination of precisions that was seen (`costs`), and the search adds these up.
"""
