"""What a config can name: the built-in parts of each kind with their properties, and the user's own as ``module:name``.

The configuration checks names here, so this package imports no torch and nothing of the configuration.
"""
