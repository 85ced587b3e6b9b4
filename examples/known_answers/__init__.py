"""Three questions whose answer is known before they are asked."""
