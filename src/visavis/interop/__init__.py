"""Adapters that run visavis models inside other libraries."""
