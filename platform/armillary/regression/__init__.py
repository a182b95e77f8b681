"""Scheduled regression: run chosen jobs again, compare with a blessed baseline, alarm on a real drop.

``gate`` decides from numbers alone, ``baseline`` and ``results`` keep them, ``runner`` makes them, ``schedule`` does it
on cron lines.
"""
