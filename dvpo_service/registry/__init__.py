"""What a config can name: the built-in parts of each kind with their properties, and ``module:name`` of the user's own.

This room is below the configuration, which checks names here, and imports no torch.
"""
