"""Pictures: their pixels, and the towers that make soft tokens of them."""
