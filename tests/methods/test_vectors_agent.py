"""Golden vectors of IGBv2: none; its two rewards are in test_improvable_gap_v2.py."""

USED: set[str] = set()
