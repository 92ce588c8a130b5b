"""Names and numbers in words, and the HTML that pages and notebooks share. Needs neither torch nor NumPy."""
