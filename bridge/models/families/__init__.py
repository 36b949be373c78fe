"""One file per model family: architecture facts as data. A new file here is a new family, with no list to edit."""
