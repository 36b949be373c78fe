"""From files to rows: one file per format."""
