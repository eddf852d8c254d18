"""Who is scored when: packs, turns, one forward at a time."""
