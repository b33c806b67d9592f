"""InternVL3's model: vision tower, projector, decoder, key/value cache and LoRA adapters.

Axis letters, the same in every docstring and annotation of model/, training/ and inference/:

    B  rows of the batch                  M  tiles, of all rows
    T  tokens of a row; queries           P  tokens of a tile in the tower: CLS and patches
    S  keys: T, or slots of the cache     C  width of the tower
    D  width of the decoder               F  visual tokens of a row
    V  vocabulary, padding included       L  layers
    N  query heads                        R  rank of a LoRA adapter
    K  key/value heads, N = G * K         H  width of a head

An annotation such as `Float[Array, "B T D"]` is documentation at run time. tests/test_shapes.py
checks all of them with jaxtyping and beartype.
"""
