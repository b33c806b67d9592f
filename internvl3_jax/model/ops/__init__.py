"""Operations of the model: attention and its backends, rotary embedding, norms, linear layers."""
