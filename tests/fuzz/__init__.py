"""Random configurations against one device and against float64 NumPy."""
