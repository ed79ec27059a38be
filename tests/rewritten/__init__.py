"""The catalogued mistakes of every lesson, each written in another way than in the catalogue."""
