"""Who runs a search: the only modules that import Ray."""
