"""Building blocks without parameters of their own: attention, rotary embedding, norms."""
