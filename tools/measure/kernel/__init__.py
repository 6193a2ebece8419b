"""Every op as a case: its inputs, its twin's check, its cost, its goal; and what is counted of it without a GPU."""
