"""A search over several processes or machines: the question as text, its parts as files, and who works on them."""
