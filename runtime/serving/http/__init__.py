"""What any web server of this project takes from a stranger, and how it refuses the rest."""
