"""Embeddings of a folder as a Parquet table, exact nearest neighbours in it, and a page that shows them."""
