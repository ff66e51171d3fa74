"""How far two maps of one example agree."""
