"""Sweeps and studies: many runs that answer one question."""
