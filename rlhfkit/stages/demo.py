"""The three stages on a bundled model and data, offline, on a CPU, in minutes."""
