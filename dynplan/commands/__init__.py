"""One module per command of ``dynplan``; :mod:`dynplan.cli` puts them together."""
