"""Files that hold weights: readers, and the writer of the pack."""
