"""What an answer attended to, for people: in the terminal, as a page, as a picture. Needs no model."""
