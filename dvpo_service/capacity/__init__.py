"""Whether a run fits its devices, and which stage takes longest: arithmetic from a config, before anything starts."""
