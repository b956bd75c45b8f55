"""The largest sizes that the Triton kernels take. Ops refuse larger ones by name. This module needs no Triton."""

# Blocks along a grid's second side, on every GPU. The first has 2^31 - 1.
GRID_SIDE = 65_535
# The norms' backward gives each block of that side 1,024 columns of a wide row.
NORM_COLUMNS = GRID_SIDE * 1024
# Cross-entropy's backward gives each 2,048 classes of a position at least, as many as one program takes where classes
# are not adjacent.
CROSS_ENTROPY_CLASSES = GRID_SIDE * 2048
# Attention counts rows and columns in 32 bits: the sum of a place, a diagonal and a window's side is below 2^31.
ATTENTION_ROWS = 2**30 - 1
