"""What blocks and the output head compute, and Triton's kernels for it; no model library is known here.

Letters of shapes, here and in all of the package:

| | | | |
|---|---|---|---|
| T | tokens of all documents | N | tokens with a target |
| H | hidden size | V | vocabulary |
| Q | query heads | F | feed-forward size |
| G | key/value heads, so groups of query heads | W | width of the fused query, key and value, (Q + 2G)·D |
| D | head size | P | rows of a learned prefix |
| R | columns for LoRA's ranks | O, I | rows (out) and columns (in) of a weight |
| C | columns of a matrix of any width | L | tokens of the longest document |

From the bottom up: an operation's plain form is its reference, in `ops`, `fp8`, `dropout`, `prefix` and
`scale_shift`, which choose between it and Triton's form, in a file of its own; `ssd`, a state space, has only
the plain form. `frozen_linear` multiplies by frozen weights with LoRA. A block's products are `dequantized`,
`fp8_block` or `scaled_products`, and `block` is the whole block. `cross_entropy` is the head.
"""
