"""The report page, its figures, cost tables on the terminal; from artefacts alone."""
