"""Model loaders: one copy of the weights, read once, used by every layout."""
