"""The operators `sus::attention` and `sus::attention_backward`, and what runs them."""
