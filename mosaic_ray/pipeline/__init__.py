"""Stages: declared once, looked up in the store or computed."""
