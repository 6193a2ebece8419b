"""A bench document as one HTML page."""
