"""What every room needs and no room owns: errors, atomic files, documents of text."""
