"""A run or a study as a page to look into."""
