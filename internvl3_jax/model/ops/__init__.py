"""Operations of the model: attention and its implementations, rotary embedding, norms, linear
layers.
"""
