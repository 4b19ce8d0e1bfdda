"""The data wing: logs read, filtered, split and described; four whose answer is planted; public ones fetched."""
