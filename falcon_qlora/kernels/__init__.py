"""The computations of blocks and output head, with Triton kernels; independent of any model library.

Letters of shapes in the whole package, except in `ssd`, which has its own:

| | | | |
|---|---|---|---|
| T | tokens of all documents | N | tokens with a target |
| H | hidden size | V | vocabulary |
| Q | query heads | F | feed-forward size |
| G | key/value heads, so groups of query heads | W | width of the fused query, key and value, (Q + 2G)·D |
| D | head size | P | rows of a learned prefix |
| R | columns for LoRA's ranks | O, I | rows (out) and columns (in) of a weight |
| C | columns of a matrix of any width | L | tokens of the longest document |

From the bottom up: `ops`, `fp8`, `dropout`, `prefix`, `scale_shift` and `ssd_ops` hold each operation's plain
form, its reference, and choose between it and Triton's form, which has a file of its own. `ssd_ops`' plain
forms, of a state space, are in `ssd`. `frozen_linear` multiplies by frozen weights with LoRA; they are
dequantized into memory of `workspace`. `block` is a whole block whose attention and feed-forward layer are
parallel, with the products of `dequantized`, `fp8_block` or `scaled_products`; the first two take GELU into
products of an optional library, with `gelu_products` and `fp8_gelu_products`. `sublayer` is one where they
follow each other, with the products of `frozen_linear` or `fp8_groups`; `mixers` has what is between them.
`cross_entropy` is the head.
"""
