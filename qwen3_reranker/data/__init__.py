"""Files of texts and of candidate lists."""
