"""What classes that users derive may be: other bases, and names that are taken."""
