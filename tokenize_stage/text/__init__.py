"""Captions -> text ids and, on request, text states."""
