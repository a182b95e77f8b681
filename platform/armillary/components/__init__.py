"""Modules that objectives and backbones are built from; import them from their own modules."""
