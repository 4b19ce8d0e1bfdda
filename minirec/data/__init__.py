"""The data wing: logs read, filtered, split and described; three whose answer is planted; public ones fetched."""
