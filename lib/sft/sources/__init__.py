"""From the files of a source, wherever they are, to blocks of rows."""
