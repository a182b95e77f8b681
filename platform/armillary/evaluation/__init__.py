"""Judging embeddings: extraction, protocols, figures and report pages."""
